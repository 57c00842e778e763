#ifndef MOED_CLIENT_JSON_H
#define MOED_CLIENT_JSON_H

#include <protobuf-c/protobuf-c.h>
#include <stdio.h>

/*
 * Prints a message as one line of JSON, by its descriptor: every field under its name in the .proto file, zeros and
 * empty lists too, but no absent sub-message. Floats have the 9 digits that give them back exactly; those that are not
 * finite, which JSON cannot say, are null. Enumerators are their names. Fields of type bytes, and oneof, are left out:
 * moed.proto has none. Errors are the stream's: see ferror.
 */
void json_print_line(FILE *out, const ProtobufCMessage *message);

#endif
