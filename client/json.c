#include "client/json.h"

#include <inttypes.h>
#include <math.h>
#include <stdbool.h>
#include <string.h>

static void print_string(FILE *out, const char *text) {
    putc('"', out);
    for (const char *c = text; *c; c++) {
        if (*c == '"' || *c == '\\')
            fprintf(out, "\\%c", *c);
        else if ((unsigned char)*c < 0x20)
            fprintf(out, "\\u%04x", (unsigned char)*c);
        else
            putc(*c, out);
    }
    putc('"', out);
}

static void print_real(FILE *out, double value, int digits) {
    if (isfinite(value))
        fprintf(out, "%.*g", digits, value);
    else
        fputs("null", out);
}

static void print_message(FILE *out, const ProtobufCMessage *message);

/* One value of the field's type at `at`. */
static void print_value(FILE *out, const ProtobufCFieldDescriptor *field, const void *at) {
    switch (field->type) {
    case PROTOBUF_C_TYPE_INT32:
    case PROTOBUF_C_TYPE_SINT32:
    case PROTOBUF_C_TYPE_SFIXED32:
        fprintf(out, "%" PRId32, *(const int32_t *)at);
        break;
    case PROTOBUF_C_TYPE_INT64:
    case PROTOBUF_C_TYPE_SINT64:
    case PROTOBUF_C_TYPE_SFIXED64:
        fprintf(out, "%" PRId64, *(const int64_t *)at);
        break;
    case PROTOBUF_C_TYPE_UINT32:
    case PROTOBUF_C_TYPE_FIXED32:
        fprintf(out, "%" PRIu32, *(const uint32_t *)at);
        break;
    case PROTOBUF_C_TYPE_UINT64:
    case PROTOBUF_C_TYPE_FIXED64:
        fprintf(out, "%" PRIu64, *(const uint64_t *)at);
        break;
    case PROTOBUF_C_TYPE_FLOAT:
        print_real(out, (double)*(const float *)at, 9);
        break;
    case PROTOBUF_C_TYPE_DOUBLE:
        print_real(out, *(const double *)at, 17);
        break;
    case PROTOBUF_C_TYPE_BOOL:
        fputs(*(const protobuf_c_boolean *)at ? "true" : "false", out);
        break;
    case PROTOBUF_C_TYPE_ENUM: {
        const ProtobufCEnumValue *value = protobuf_c_enum_descriptor_get_value(field->descriptor, *(const int *)at);
        if (value)
            print_string(out, value->name);
        else
            fprintf(out, "%d", *(const int *)at);
        break;
    }
    case PROTOBUF_C_TYPE_STRING:
        print_string(out, *(const char *const *)at);
        break;
    case PROTOBUF_C_TYPE_MESSAGE:
        print_message(out, *(const ProtobufCMessage *const *)at);
        break;
    case PROTOBUF_C_TYPE_BYTES:
        break;
    }
}

static size_t value_size(const ProtobufCFieldDescriptor *field) {
    switch (field->type) {
    case PROTOBUF_C_TYPE_INT64:
    case PROTOBUF_C_TYPE_SINT64:
    case PROTOBUF_C_TYPE_SFIXED64:
    case PROTOBUF_C_TYPE_UINT64:
    case PROTOBUF_C_TYPE_FIXED64:
        return sizeof(uint64_t);
    case PROTOBUF_C_TYPE_DOUBLE:
        return sizeof(double);
    case PROTOBUF_C_TYPE_BOOL:
        return sizeof(protobuf_c_boolean);
    case PROTOBUF_C_TYPE_ENUM:
        return sizeof(int);
    case PROTOBUF_C_TYPE_STRING:
    case PROTOBUF_C_TYPE_MESSAGE:
        return sizeof(void *);
    default:
        return sizeof(uint32_t);
    }
}

static bool field_shown(const ProtobufCFieldDescriptor *field, const char *at) {
    if (field->type == PROTOBUF_C_TYPE_BYTES || (field->flags & PROTOBUF_C_FIELD_FLAG_ONEOF))
        return false;
    return field->type != PROTOBUF_C_TYPE_MESSAGE || field->label == PROTOBUF_C_LABEL_REPEATED || *(void *const *)at;
}

static void print_message(FILE *out, const ProtobufCMessage *message) {
    const char *base = (const char *)message;
    const char *separator = "";
    putc('{', out);
    for (unsigned i = 0; i < message->descriptor->n_fields; i++) {
        const ProtobufCFieldDescriptor *field = &message->descriptor->fields[i];
        const char *at = base + field->offset;
        if (!field_shown(field, at))
            continue;
        fprintf(out, "%s\"%s\":", separator, field->name);
        separator = ",";
        if (field->label == PROTOBUF_C_LABEL_REPEATED) {
            size_t count = *(const size_t *)(base + field->quantifier_offset);
            const char *values = *(const char *const *)at;
            putc('[', out);
            for (size_t j = 0; j < count; j++) {
                if (j)
                    putc(',', out);
                print_value(out, field, values + j * value_size(field));
            }
            putc(']', out);
        } else {
            print_value(out, field, at);
        }
    }
    putc('}', out);
}

void json_print_line(FILE *out, const ProtobufCMessage *message) {
    print_message(out, message);
    putc('\n', out);
}
