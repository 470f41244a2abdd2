#!/usr/bin/env bash
# Builds the libraries of CANN that the torch_npu wheel links to, out of stand_in.cpp: what is not there returns 0.
#   build.sh PYTHON OUT      PYTHON has torch and torch_npu; afterwards LD_LIBRARY_PATH=OUT
set -euo pipefail
export LC_ALL=C
python=$1 out=$2
here=$(cd "$(dirname "$0")" && pwd)
site=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["platlib"])')
mkdir -p "$out"
cd "$out"

nm -D --undefined-only "$site"/torch_npu/lib/libtorch_npu.so "$site"/torch_npu/_C*.so "$site"/torch_npu/lib/libtensorpipe.so |
    awk 'NF && !/:$/ {print $NF}' | sed 's/@.*//' | sort -u >undefined
for library in "$site"/torch/lib/libtorch*.so "$site"/torch/lib/libc10.so "$site"/torch_npu/lib/*.so \
    $(ldd "$site"/torch/lib/libtorch_cpu.so | awk '$3 ~ /^\// {print $3}'); do
    nm -D --defined-only "$library" 2>/dev/null | awk '{print $NF}' | sed 's/@.*//'
done | sort -u >defined
comm -23 undefined defined | grep -vE '^(_?Py|__gmon|_ITM|__cxa|__tls)' >linked || true
# And what it looks up by name while it runs.
strings -n 6 "$site"/torch_npu/lib/libtorch_npu.so |
    grep -E '^(aclrt|aclGet|aclSet|aclsys|aclmdl|aclInit|aclop)[A-Za-z0-9]*$' | grep -v Face | sort -u >looked_up

g++ -std=c++17 -O1 -Wall -Werror -fPIC -c "$here/stand_in.cpp" -o stand_in.o
nm stand_in.o | awk '$2 == "T" {print $3}' | sort >have
{
    echo .text
    sort -u linked looked_up | comm -23 - have | while read -r name; do
        printf '.globl %s\n.type %s,@function\n%s:\n xor %%eax,%%eax\n ret\n' "$name" "$name" "$name"
    done
    echo '.section .note.GNU-stack,"",@progbits'
} >rest.S
g++ -shared -o libascendcl.so stand_in.o rest.S -lpthread
for library in hccl acl_op_compiler ge_runner graph acl_tdt_channel; do
    gcc -shared -o "lib$library.so" -x c /dev/null -Wl,--no-as-needed -L. -lascendcl -Wl,-rpath,'$ORIGIN'
done
