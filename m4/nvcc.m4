# MOED_NVCC
# ---------
# --with-cuda[=DIR] and --with-cuda-arch=LIST. Sets the conditional CUDA, and with it NVCC, NVCC_ARCH_FLAGS,
# CUDA_CPPFLAGS and CUDA_LIBS. Without either option CUDA is used where nvcc is found and works.
AC_DEFUN([MOED_NVCC], [
  AC_ARG_WITH([cuda],
    [AS_HELP_STRING([--with-cuda@<:@=DIR@:>@], [build for NVIDIA GPUs with the toolkit in DIR @<:@where nvcc is found@:>@])],
    [], [with_cuda=check])
  AC_ARG_WITH([cuda-arch],
    [AS_HELP_STRING([--with-cuda-arch=LIST],
      [compute capabilities to build for, such as 80,90a @<:@those of the GPUs here, else 90a@:>@])],
    [AS_IF([test "x$with_cuda" = xcheck], [with_cuda=yes])],
    [with_cuda_arch=`nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null |
       sed -e 's/\.//' -e 's/^90$/90a/' | sort -un | paste -sd, -`
     AS_IF([test -z "$with_cuda_arch"], [with_cuda_arch=90a])])
  AC_ARG_VAR([NVCC], [CUDA compiler])

  have_cuda=no
  AS_IF([test "x$with_cuda" != xno], [
    AS_CASE([$with_cuda],
      [yes|check], [AC_PATH_PROG([NVCC], [nvcc], [], [$PATH$PATH_SEPARATOR/usr/local/cuda/bin])],
      [AC_PATH_PROG([NVCC], [nvcc], [], [$with_cuda/bin])])
    AS_IF([test -n "$NVCC"], [
      # nvcc lies in DIR/bin, and often behind a link.
      cuda_dir=`readlink -f "$NVCC"`
      cuda_dir=`AS_DIRNAME(["$cuda_dir"])`
      cuda_dir=`AS_DIRNAME(["$cuda_dir"])`
      MOED_NVCC_ARCH_FLAGS
      CUDA_CPPFLAGS="-I$cuda_dir/include"
      for cuda_lib in "$cuda_dir/lib64" "$cuda_dir/lib" "$cuda_dir/targets/x86_64-linux/lib"; do
        AS_IF([test -f "$cuda_lib/libcudart_static.a"], [break])
      done
      CUDA_LIBS="-L$cuda_lib -lcudart_static -ldl -lrt -lpthread"
      MOED_NVCC_WORKS([have_cuda=yes])
    ])
    AS_IF([test "x$with_cuda$have_cuda" = xcheckno],
      [AS_IF([test -n "$NVCC"], [AC_MSG_WARN([$NVCC does not work: building without CUDA; config.log says why])])],
      [test "x$have_cuda" = xno],
      [AC_MSG_ERROR([--with-cuda: no nvcc that makes objects the C compiler can link; config.log says why])])
  ])
  AC_SUBST([NVCC_ARCH_FLAGS])
  AC_SUBST([CUDA_CPPFLAGS])
  AC_SUBST([CUDA_LIBS])
  AM_CONDITIONAL([CUDA], [test "x$have_cuda" = xyes])
  AS_IF([test "x$have_cuda" = xyes], [AC_DEFINE([WITH_CUDA], [1], [Define when the CUDA executor is built.])])
])

# Code for each architecture of the list, and of the last one also the intermediate form, for GPUs to come.
AC_DEFUN([MOED_NVCC_ARCH_FLAGS], [
  NVCC_ARCH_FLAGS=
  for arch in `AS_ECHO(["$with_cuda_arch"]) | tr ',' ' '`; do
    AS_CASE([$arch],
      [*[[!0-9a-z]]*|[[!0-9]]*], [AC_MSG_ERROR([--with-cuda-arch: found $arch, expected compute capabilities such as 80,90a])],
      [90], [arch=90a]) # the matrix unit is among what only 90a has
    NVCC_ARCH_FLAGS="$NVCC_ARCH_FLAGS -gencode arch=compute_$arch,code=sm_$arch"
  done
  AS_IF([test -z "$NVCC_ARCH_FLAGS"], [AC_MSG_ERROR([--with-cuda-arch: found nothing, expected compute capabilities such as 80,90a])])
  NVCC_ARCH_FLAGS="$NVCC_ARCH_FLAGS -gencode arch=compute_$arch,code=compute_$arch"
])

# MOED_NVCC_WORKS(IF-YES): compiles a kernel as the makefile does and links it with the C compiler.
AC_DEFUN([MOED_NVCC_WORKS], [
  AC_MSG_CHECKING([whether $NVCC makes objects that $CC links])
  cat > conftest.cu <<_MOED_EOF
#include <cuda_runtime.h>
__global__ static void fill(float *out) { out[[threadIdx.x]] = 1; }
extern "C" int conftest(float *out);
extern "C" int conftest(float *out) { fill<<<1, 32>>>(out); return cudaGetLastError() != cudaSuccess; }
_MOED_EOF
  AS_IF([AC_RUN_LOG([$NVCC $NVCC_ARCH_FLAGS -Xcompiler -fno-exceptions,-fno-rtti,-fno-threadsafe-statics -c conftest.cu -o conftest_cu.o >&AS_MESSAGE_LOG_FD])], [
    moed_saved_LIBS=$LIBS
    LIBS="conftest_cu.o $CUDA_LIBS $LIBS"
    AC_LINK_IFELSE([AC_LANG_PROGRAM([[int conftest(float *out);]], [[return conftest(0);]])],
      [AC_MSG_RESULT([yes])
       $1],
      [AC_MSG_RESULT([no])])
    LIBS=$moed_saved_LIBS
  ], [AC_MSG_RESULT([no])])
  rm -f conftest.cu conftest_cu.o
])
