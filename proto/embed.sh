#!/bin/sh
# embed.sh HEADER NAME: standard input as the C arrays that HEADER declares, `NAME` and `NAME_size`.
set -eu
printf '#include "%s"\n\nconst unsigned char %s[] = {\n' "$1" "$2"
od -An -v -tx1 | sed 's/ \([0-9a-f][0-9a-f]\)/0x\1,/g'
printf '};\n\nconst size_t %s_size = sizeof %s;\n' "$2" "$2"
