# MOED_ARG_SANITIZER(SWITCH, WHAT, FLAGS)
# ---------------------------------------
# --enable-SWITCH builds everything with the compiler's FLAGS.
AC_DEFUN([MOED_ARG_SANITIZER], [
  AC_ARG_ENABLE([$1], [AS_HELP_STRING([--enable-$1], [build with $2])], [], [enable_$1=no])
  AS_IF([test "x$enable_$1" = xyes], [
    AC_MSG_CHECKING([whether $CC links with $3])
    moed_saved_CFLAGS=$CFLAGS
    CFLAGS="$CFLAGS $3"
    AC_LINK_IFELSE([AC_LANG_PROGRAM()], [AC_MSG_RESULT([yes])],
      [AC_MSG_RESULT([no])
       AC_MSG_ERROR([--enable-$1 needs a compiler that has $2])])
    CFLAGS=$moed_saved_CFLAGS
    SANITIZER_FLAGS="$SANITIZER_FLAGS $3"
  ])
])

# MOED_SANITIZERS
# ---------------
# Sets SANITIZER_FLAGS, for the compiler and the linker.
AC_DEFUN([MOED_SANITIZERS], [
  SANITIZER_FLAGS=
  MOED_ARG_SANITIZER([asan], [AddressSanitizer], [-fsanitize=address -fno-omit-frame-pointer])
  MOED_ARG_SANITIZER([ubsan], [UndefinedBehaviorSanitizer], [-fsanitize=undefined -fno-sanitize-recover=undefined])
  MOED_ARG_SANITIZER([tsan], [ThreadSanitizer], [-fsanitize=thread])
  AS_IF([test "x$enable_asan$enable_tsan" = xyesyes],
    [AC_MSG_ERROR([--enable-asan and --enable-tsan exclude each other])])

  AC_ARG_ENABLE([fuzz], [AS_HELP_STRING([--enable-fuzz], [link the fuzz targets with libFuzzer (needs clang)])],
    [], [enable_fuzz=no])
  AS_IF([test "x$enable_fuzz" = xyes], [
    AC_MSG_CHECKING([whether $CC has libFuzzer])
    moed_saved_CFLAGS=$CFLAGS
    CFLAGS="$CFLAGS -fsanitize=fuzzer"
    AC_LINK_IFELSE([AC_LANG_SOURCE([int LLVMFuzzerTestOneInput(const unsigned char *data, __SIZE_TYPE__ size);
      int LLVMFuzzerTestOneInput(const unsigned char *data, __SIZE_TYPE__ size) { return !data && size; }])],
      [AC_MSG_RESULT([yes])],
      [AC_MSG_RESULT([no])
       AC_MSG_ERROR([--enable-fuzz needs clang: configure with CC=clang])])
    CFLAGS=$moed_saved_CFLAGS
    SANITIZER_FLAGS="$SANITIZER_FLAGS -fsanitize=fuzzer-no-link"
  ])
  AM_CONDITIONAL([FUZZ], [test "x$enable_fuzz" = xyes])
  AC_SUBST([SANITIZER_FLAGS])
])
