#!/usr/bin/env bash
# Makes .venv with fastlt and everything it needs. Once made, calling it again takes a moment.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
venv=$PWD/.venv
stamp=$venv/.set-up-from
wanted=$(cat pyproject.toml tools/setup.sh tools/constraints-cpu.txt fastlt/decode/jpeg/* | sha256sum | cut -d' ' -f1)
[ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && exit 0

say() { printf '\033[1m%s\033[0m\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 2; }
is_root() { [ "$(id -u)" = 0 ]; }
has_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; }

apt_updated=
apt_install() {  # quiet where it works; the whole log where it does not
    [ -n "$apt_updated" ] || apt-get update -qq >/dev/null 2>&1 || true
    apt_updated=1
    local log; log=$(mktemp)
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >"$log" 2>&1 || { cat "$log" >&2; return 1; }
}

make_venv() {
    command -v "$python" >/dev/null || die "no $python: install Python 3.10 or newer, or name one with PYTHON=..."
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || die "$("$python" -V) is too old: Python 3.10 or newer is needed; name one with PYTHON=..."
    [ -x "$venv/bin/pip" ] && return
    if ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
        is_root || die "Python has no venv module: run 'sudo apt-get install python3-venv' and try again"
        say "installing python3-venv"
        apt_install python3-venv || die "apt could not install python3-venv"
    fi
    say "making .venv"
    "$python" -m venv "$venv"
}

install_torch() {
    if has_gpu; then
        say "NVIDIA GPU found: installing the CUDA build of torch"
        "$venv/bin/pip" install -qq 'torch>=2.11'
    else
        # A '+cpu' version is never a CUDA build: where pip cannot find it, this stops instead of fetching several GB.
        say "no NVIDIA GPU: installing the CPU build of torch"
        "$venv/bin/pip" install -qq "torch==2.13.0+cpu" ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} ||
            die "pip cannot install the CPU build of torch 2.13.0. If it does not find it, pass PyTorch's CPU wheel index, named on pytorch.org under 'Get Started': make setup TORCH_INDEX=<address>"
    fi
}

has_libjpeg() {
    command -v cc >/dev/null && printf '#include <stdio.h>\n#include <jpeglib.h>\n' | cc -E - >/dev/null 2>&1
}

install_libjpeg() {
    if ! has_libjpeg && is_root; then
        say "installing libjpeg's headers"
        apt_install libjpeg-dev gcc libc6-dev || true
    fi
    has_libjpeg || say "going on without 'pack --transcode', and without a C compiler without fastlt's JPEG decoder; for them, run: sudo apt-get install libjpeg-dev gcc && rm -f .venv/.set-up-from && make setup"
}

install_fastlt() {
    say "installing fastlt"
    local constraints=()
    has_gpu || constraints=(-c tools/constraints-cpu.txt)
    "$venv/bin/pip" install -qq "${constraints[@]}" -e '.[dev,docs,timm,onnx,curate,sweep,formats,peft,open-clip]'
}

install_dali() {
    "$venv/bin/python" -c 'import nvidia.dali' 2>/dev/null && return
    say "installing DALI"
    local constraints=()
    has_gpu || constraints=(-c tools/constraints-cpu.txt)
    "$venv/bin/pip" install -qq "${constraints[@]}" 'nvidia-dali-cuda130>=2.4' || say "DALI cannot be installed here: going on without the dali engine"
}

ffcv_libraries=(libturbojpeg0-dev libopencv-core-dev libopencv-imgproc-dev pkg-config g++)

ffcv_buildable() {
    command -v g++ pkg-config >/dev/null && pkg-config --exists libturbojpeg && [ -d /usr/include/opencv4/opencv2/imgproc ] &&
        [ -f "$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ]
}

install_ffcv() {
    "$venv/bin/python" -c 'import ffcv' 2>/dev/null && return
    if ! ffcv_buildable && is_root; then
        say "installing FFCV's system libraries"
        apt_install "${ffcv_libraries[@]}" || true
        ffcv_buildable || apt_install python3-dev || true
    fi
    if ! ffcv_buildable; then
        say "going on without the ffcv engine; for it, run: sudo apt-get install ${ffcv_libraries[*]} python3-dev && rm -f .venv/.set-up-from && make setup"
        return
    fi
    say "building FFCV"
    # Debian's full OpenCV is 690 MB; FFCV uses two of its modules, so the header and the pkg-config file that it asks for name just those.
    local build=$venv/ffcv-build
    mkdir -p "$build/shim/opencv2"
    printf '#include <opencv2/core.hpp>\n#include <opencv2/imgproc.hpp>\n' >"$build/shim/opencv2/opencv.hpp"
    printf 'Name: opencv4\nDescription: core and imgproc\nVersion: 4\nLibs: -lopencv_core -lopencv_imgproc\nCflags: -I%s/shim -I/usr/include/opencv4\n' "$build" >"$build/opencv4.pc"
    local constraints=()
    has_gpu || constraints=(-c tools/constraints-cpu.txt)
    if ! PKG_CONFIG_PATH=$build "$venv/bin/pip" install -qq "${constraints[@]}" 'ffcv==1.0.2'; then
        say "FFCV did not build: going on without the ffcv engine"
        return
    fi
    # FFCV asks for the OpenCV that draws windows, which needs libGL; the headless one is the same module without.
    local opencv; opencv=$("$venv/bin/pip" list --format=freeze | sed -n 's/^opencv-python==//p')
    "$venv/bin/pip" uninstall -qy opencv-python
    "$venv/bin/pip" install -qq "${constraints[@]}" "opencv-python-headless==$opencv"
}

has_browser() {
    command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null
}

install_browser() {  # for the tests that open the pages which fastlt writes
    if ! has_browser && is_root; then
        say "installing Chromium (80 MB to fetch, 290 MB on the disk, about a minute)"
        apt_install chromium || true
    fi
    has_browser || say "going on without a browser: the tests that open reports in one are skipped; for them, run: sudo apt-get install chromium"
}

make_venv
install_torch
install_libjpeg
install_fastlt
install_dali
install_ffcv
install_browser
echo "$wanted" >"$stamp"
say "ready: .venv/bin/fastlt --help"
