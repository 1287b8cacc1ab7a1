#!/bin/sh
# Builds the test guests with GNU binutils: build.sh [OUTPUT DIRECTORY]
set -eu
src=$(cd "$(dirname "$0")" && pwd)
out=${1:-$src}
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
for f in "$src"/*.S; do
	name=$(basename "$f" .S)
	as --64 -I "$src" -o "$tmp/$name.o" "$f"
	ld -m elf_x86_64 -Ttext=0x10000 -e start -o "$tmp/$name.elf" "$tmp/$name.o"
	objcopy -O binary -j .text "$tmp/$name.elf" "$out/$name.bin"
	chmod 644 "$out/$name.bin"
done
