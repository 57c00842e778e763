#include "config.h"

#include "gateway/descriptors.h"

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "google/protobuf/descriptor.pb-c.h"

struct symbol {
    char *name;
    size_t file;
    bool service;
};

struct descriptors {
    Google__Protobuf__FileDescriptorSet *set;
    ProtobufCBinaryData *files; /* the serialized files of the set */
    struct symbol *symbols;
    size_t symbol_count, symbol_room;
    bool no_memory;
};

/* Adds "scope.name"; returns the full name, which the index owns. */
static const char *add(struct descriptors *index, size_t file, const char *scope, const char *name, bool service) {
    if (index->symbol_count == index->symbol_room) {
        size_t room = index->symbol_room ? 2 * index->symbol_room : 64;
        struct symbol *symbols = realloc(index->symbols, room * sizeof *symbols);
        if (!symbols) {
            index->no_memory = true;
            return "";
        }
        index->symbols = symbols;
        index->symbol_room = room;
    }
    char *full = NULL;
    if (asprintf(&full, "%s%s%s", scope, scope[0] ? "." : "", name) < 0) {
        index->no_memory = true;
        return "";
    }
    index->symbols[index->symbol_count++] = (struct symbol){full, file, service};
    return full;
}

/* The values of an enum live in the scope around it. */
static void add_enum(struct descriptors *index, size_t file, const char *scope,
                     const Google__Protobuf__EnumDescriptorProto *type) {
    add(index, file, scope, type->name, false);
    for (size_t i = 0; i < type->n_value; i++)
        add(index, file, scope, type->value[i]->name, false);
}

static void add_message(struct descriptors *index, size_t file, const char *scope,
                        const Google__Protobuf__DescriptorProto *type) {
    const char *name = add(index, file, scope, type->name, false);
    for (size_t i = 0; i < type->n_field; i++)
        add(index, file, name, type->field[i]->name, false);
    for (size_t i = 0; i < type->n_nested_type; i++)
        add_message(index, file, name, type->nested_type[i]);
    for (size_t i = 0; i < type->n_enum_type; i++)
        add_enum(index, file, name, type->enum_type[i]);
}

static void add_file(struct descriptors *index, size_t file) {
    const Google__Protobuf__FileDescriptorProto *proto = index->set->file[file];
    const char *package = proto->package ? proto->package : "";
    for (size_t i = 0; i < proto->n_message_type; i++)
        add_message(index, file, package, proto->message_type[i]);
    for (size_t i = 0; i < proto->n_enum_type; i++)
        add_enum(index, file, package, proto->enum_type[i]);
    for (size_t i = 0; i < proto->n_service; i++) {
        const char *service = add(index, file, package, proto->service[i]->name, true);
        for (size_t m = 0; m < proto->service[i]->n_method; m++)
            add(index, file, service, proto->service[i]->method[m]->name, false);
    }
}

struct descriptors *descriptors_load(const unsigned char *bytes, size_t size) {
    struct descriptors *index = calloc(1, sizeof *index);
    if (!index)
        return NULL;
    index->set = google__protobuf__file_descriptor_set__unpack(NULL, size, bytes);
    if (!index->set)
        goto fail;
    index->files = calloc(index->set->n_file + 1, sizeof *index->files);
    if (!index->files)
        goto fail;
    for (size_t f = 0; f < index->set->n_file; f++) {
        const Google__Protobuf__FileDescriptorProto *file = index->set->file[f];
        index->files[f].len = google__protobuf__file_descriptor_proto__get_packed_size(file);
        index->files[f].data = malloc(index->files[f].len);
        if (!index->files[f].data)
            goto fail;
        google__protobuf__file_descriptor_proto__pack(file, index->files[f].data);
        add_file(index, f);
    }
    if (!index->no_memory)
        return index;
fail:
    descriptors_destroy(index);
    return NULL;
}

void descriptors_destroy(struct descriptors *index) {
    if (!index)
        return;
    for (size_t f = 0; index->files && f < index->set->n_file; f++)
        free(index->files[f].data);
    for (size_t s = 0; s < index->symbol_count; s++)
        free(index->symbols[s].name);
    if (index->set)
        google__protobuf__file_descriptor_set__free_unpacked(index->set, NULL);
    free(index->files);
    free(index->symbols);
    free(index);
}

const ProtobufCBinaryData *descriptors_file(const struct descriptors *index, const char *name) {
    for (size_t f = 0; f < index->set->n_file; f++)
        if (strcmp(index->set->file[f]->name, name) == 0)
            return &index->files[f];
    return NULL;
}

const ProtobufCBinaryData *descriptors_file_of(const struct descriptors *index, const char *symbol) {
    for (size_t s = 0; s < index->symbol_count; s++)
        if (strcmp(index->symbols[s].name, symbol) == 0)
            return &index->files[index->symbols[s].file];
    return NULL;
}

size_t descriptors_service_count(const struct descriptors *index) {
    size_t count = 0;
    for (size_t s = 0; s < index->symbol_count; s++)
        count += index->symbols[s].service;
    return count;
}

const char *descriptors_service(const struct descriptors *index, size_t wanted) {
    for (size_t s = 0; s < index->symbol_count; s++)
        if (index->symbols[s].service && wanted-- == 0)
            return index->symbols[s].name;
    return NULL;
}
