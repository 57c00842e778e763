#include "gateway/rpc_listen.h"

#include <errno.h>
#include <grpc/grpc_security.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "gateway/unix_path.h"

enum { PEM_BYTES_MAX = 1 << 20 };

/* A whole PEM file as a string, which the caller frees. */
static char *read_pem(const char *option, const char *path, struct status *status) {
    char *text = NULL;
    FILE *file = fopen(path, "re");
    if (!file) {
        status_set(status, STATUS_INVALID_ARGUMENT, "%s: %s: %s", option, path, strerror(errno));
        return NULL;
    }
    text = malloc(PEM_BYTES_MAX + 1);
    size_t size = text ? fread(text, 1, PEM_BYTES_MAX + 1, file) : 0;
    if (!text || ferror(file) || size > PEM_BYTES_MAX || size == 0) {
        status_set(status, STATUS_INVALID_ARGUMENT, "%s: %s: %s", option, path,
                   size > PEM_BYTES_MAX    ? "larger than 1 MiB, so no certificate"
                   : text && !ferror(file) ? "empty"
                                           : strerror(errno));
        free(text);
        text = NULL;
    } else {
        text[size] = '\0';
    }
    fclose(file);
    return text;
}

/* NULL with a status on failure. */
static grpc_server_credentials *create_credentials(const struct rpc_server_options *options, struct status *status) {
    if (!options->tls_cert && !options->tls_key && !options->tls_client_ca)
        return grpc_insecure_server_credentials_create();
    if (!options->tls_cert || !options->tls_key) {
        status_set(status, STATUS_INVALID_ARGUMENT, "TLS needs both --tls-cert and --tls-key");
        return NULL;
    }
    grpc_server_credentials *credentials = NULL;
    char *ca = NULL, *key = NULL, *cert = read_pem("--tls-cert", options->tls_cert, status);
    if (!cert || !(key = read_pem("--tls-key", options->tls_key, status)))
        goto out;
    if (options->tls_client_ca && !(ca = read_pem("--tls-client-ca", options->tls_client_ca, status)))
        goto out;
    const grpc_ssl_pem_key_cert_pair pair = {.private_key = key, .cert_chain = cert};
    grpc_ssl_server_certificate_config *config = grpc_ssl_server_certificate_config_create(ca, &pair, 1);
    credentials =
        grpc_ssl_server_credentials_create_with_options(grpc_ssl_server_credentials_create_options_using_config(
            ca ? GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY : GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE,
            config));
    if (!credentials)
        status_set(status, STATUS_INVALID_ARGUMENT, "the TLS certificate or key cannot be used");
out:
    free(cert);
    free(key);
    free(ca);
    return credentials;
}

static const char *unix_path(const char *address) {
    return strncmp(address, "unix:", 5) == 0 ? address + 5 : NULL;
}

/* ADDR:PORT or unix:PATH. C-core takes more than that, and would only say that it cannot listen. */
static bool address_allowed(const char *address) {
    if (unix_path(address))
        return true;
    const char *colon = strrchr(address, ':');
    if (!colon || colon == address)
        return false;
    size_t digits = strspn(colon + 1, "0123456789");
    return digits >= 1 && digits <= 5 && colon[1 + digits] == '\0' && atoi(colon + 1) <= UINT16_MAX;
}

int rpc_listen(grpc_server *server, const struct rpc_server_options *options, char *bound, size_t bound_size,
               struct status *status) {
    const char *address = options->listen;
    if (!address_allowed(address))
        return status_set(status, STATUS_INVALID_ARGUMENT,
                          "--listen: \"%s\"; ADDR:PORT with a port up to 65535, or unix:PATH, is allowed", address);
    if (unix_path(address) && unix_path_clear(unix_path(address), status))
        return status_prefix(status, "--listen: %s", address);
    grpc_server_credentials *credentials = create_credentials(options, status);
    if (!credentials)
        return -1;
    int port = grpc_server_add_http2_port(server, address, credentials);
    grpc_server_credentials_release(credentials);
    if (!port)
        return status_set(status, STATUS_UNAVAILABLE,
                          "--listen: cannot listen on %s: the port is in use, the address is not this machine's%s",
                          address, options->tls_cert ? ", or certificate and key do not fit" : "");
    if (unix_path(address))
        snprintf(bound, bound_size, "%s", address);
    else
        snprintf(bound, bound_size, "%.*s:%d", (int)(strrchr(address, ':') - address), address, port);
    return 0;
}
