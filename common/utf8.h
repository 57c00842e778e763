#ifndef MOED_COMMON_UTF8_H
#define MOED_COMMON_UTF8_H

#include <stddef.h>

/* The length of the UTF-8 sequence at s, a terminated string, or 0 (RFC 3629: no overlong forms, surrogates, code
 * points past U+10FFFF). */
size_t utf8_length(const unsigned char *s);

#endif
