#!/usr/bin/env bash
# BAT OS launcher: sets up what is missing, then starts, tests, asks or stops. Runs on bash 3.2 too.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
absolute() {
    case $1 in
        /*) echo "$1" ;;
        *) echo "$PWD/$1" ;;
    esac
}
BATOS_HOME=$(absolute "${BATOS_HOME:-$HERE}")
BATOS_VENV=$(absolute "${BATOS_VENV:-$HERE/.venv}")
export BATOS_HOME BATOS_VENV
RUN=$BATOS_HOME/run
PY=$BATOS_VENV/bin/python
LIVE_TIMEOUT_S=600

usage() {
    cat <<'END'
Usage: ./puter.sh [COMMAND]

  (none)   everything: packages, models, watchdog, kernel, client
  setup    packages and models only
  kernel   watchdog and kernel in the foreground, for servers and scripts; options: those of
           min_watchdog_service.py
  client   the terminal client; options: those of chat_client.py (-c TEXT runs one command)
  status   what the kernel says about itself
  stop     ends watchdog and kernel of this home
  inspect  lists the transactions in the living image (also while the kernel runs); runs nothing of it;
           --object NAME for one object
  backup   what is new in the image, verified by restoring it; --to FOLDER, --full
  restore  puts a backup in the place of the image, which is kept; --at TIME, --from FOLDER, --to FILE
  verify   reads the whole image and says whether it is sound; --backups for the newest backup
  pack     forgets versions that were replaced long ago; --days N
  key      which clients may speak to the kernel: key add NAME, key list, key revoke NAME
  test     style, types and all tests; further arguments go to pytest
  help     this text

BATOS_HOME (this folder) holds image, keys and logs, BATOS_VENV (.venv) the packages,
BATOS_MODELS_DIR (the user's cache folder) the models. docs/OPERATIONS.md has the rest.
END
}

say() { printf '%s\n' "$*" >&2; }

die() {
    say "error: $*"
    exit 1
}

# ---------------------------------------------------------------------------------------- set-up

# install_line APT DNF PACMAN ZYPPER MAC: the command that installs a system package here.
install_line() {
    if [ "$(uname)" = Darwin ]; then echo "$5"
    elif command -v apt-get >/dev/null; then echo "sudo apt-get install -y $1"
    elif command -v dnf >/dev/null; then echo "sudo dnf install -y $2"
    elif command -v pacman >/dev/null; then echo "sudo pacman -S --needed $3"
    elif command -v zypper >/dev/null; then echo "sudo zypper install -y $4"
    else echo "your system's package manager ($1)"
    fi
}

find_python() {
    local name
    for name in python3.13 python3.12 python3.11 python3; do
        if command -v "$name" >/dev/null &&
            "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    die "Python 3.11 or newer is missing; install it with:
    $(install_line 'python3 python3-venv' python3.12 python python312 'brew install python@3.13')"
}

check_compiler() {
    local name
    for name in "${CXX:-c++}" g++ clang++; do
        if command -v "$name" >/dev/null; then return; fi
    done
    die "a C++ compiler is missing (llama-cpp-python is built from source); install it with:
    $(install_line build-essential 'gcc-c++ make' base-devel 'gcc-c++ make' 'xcode-select --install')"
}

# phase TEXT COMMAND...: runs a command with its output in the log; shows the log's end if it fails.
phase() {
    local text=$1 log=$RUN/setup.log began=$SECONDS
    shift
    printf '%s ... ' "$text" >&2
    if "$@" >>"$log" 2>&1; then
        say "done ($((SECONDS - began)) s)"
    else
        say failed
        tail -n 20 "$log" >&2
        die "$text failed; the whole log: $log"
    fi
}

create_venv() {
    local python
    python=$(find_python)
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        die "$python has no venv module; install it with: $(install_line python3-venv python3 python python3-venv 'brew install python@3.13')"
    phase "Creating the virtual environment" "$python" -m venv --clear "$BATOS_VENV"
}

# install_packages FILE: does nothing if the environment's stamp says that these very files are installed.
install_packages() {
    local file=$HERE/$1 stamp=$BATOS_VENV/$1.stamp wanted
    "$PY" -c '' 2>/dev/null || create_venv
    wanted="$("$PY" -V) $(cat "$HERE/requirements.txt" "$file" | cksum)"
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then return; fi
    check_compiler
    phase "Installing $1 (minutes, the first time)" "$PY" -m pip install --disable-pip-version-check -r "$file"
    echo "$wanted" >"$stamp"
}

get_models() {
    (cd "$HERE" && "$PY" -m uvm.mind.assets --quiet >&2)
}

set_up() {
    mkdir -p "$RUN"
    install_packages requirements.txt
    get_models
}

need_set_up() {
    mkdir -p "$RUN"
    [ -x "$PY" ] || die "nothing is set up here yet; run: ./puter.sh setup"
}

# ------------------------------------------------------------------------------- watchdog and kernel

watchdog_pid() { "$PY" "$HERE/min_watchdog_service.py" --pid; }

kernel_answers() { "$PY" "$HERE/chat_client.py" -c /status >/dev/null 2>&1; }

# These two set `watchdog`, its pid, and `log`, where to look when the kernel does not come up.
start_in_background() {
    log=$RUN/watchdog.log
    "$PY" -c 'import os, sys; os.setsid(); os.execv(sys.argv[1], sys.argv[1:])' \
        "$PY" "$HERE/min_watchdog_service.py" >"$log" 2>&1 </dev/null &
    watchdog=$!
}

start_in_window() {
    local began=$SECONDS
    open_window "BAT OS Watchdog Service" kernel
    until watchdog=$(watchdog_pid); do
        [ $((SECONDS - began)) -lt 30 ] || die "the watchdog's window shows nothing; try: ./puter.sh kernel"
        sleep 0.2
    done
}

wait_until_live() {
    local began=$SECONDS
    if kernel_answers; then return; fi
    say "Waiting for the kernel (log: $log) ..."
    until kernel_answers; do
        if ! kill -0 "$watchdog" 2>/dev/null; then
            tail -n 20 "$log" >&2
            die "the kernel did not start; the whole log: $log"
        fi
        [ $((SECONDS - began)) -lt $LIVE_TIMEOUT_S ] || die "the kernel does not answer; see $log"
        sleep 0.2
    done
}

# ------------------------------------------------------------------------------------------- windows

find_terminal() {
    local name
    if [ -n "${SSH_CONNECTION:-}" ]; then return 1; fi
    if [ "$(uname)" = Darwin ]; then
        echo osascript
        return
    fi
    if [ -z "${DISPLAY:-}${WAYLAND_DISPLAY:-}" ]; then return 1; fi
    for name in x-terminal-emulator gnome-terminal konsole xterm; do
        if command -v "$name" >/dev/null; then
            echo "$name"
            return
        fi
    done
    return 1
}

# open_window TITLE COMMAND: runs a command of this script in a window that stays open at its end.
open_window() {
    local title=$1 command=$2 name line
    local stay='"$@"; printf "\n%s\n" "Press Enter to close this window."; read -r _'
    local words=(env)  # a new window need not inherit this environment
    for name in $(compgen -A export BATOS_); do words+=("$name=${!name}"); done
    words+=(bash -c "$stay" bash "$HERE/puter.sh" "$command")
    case $(find_terminal) in
        osascript)
            line=$(printf '%q ' "${words[@]}" | sed 's/[\\"]/\\&/g')
            osascript -e "tell application \"Terminal\" to do script \"$line\"" >/dev/null
            ;;
        gnome-terminal) gnome-terminal --title="$title" -- "${words[@]}" ;;
        konsole) konsole -p tabtitle="$title" -e "${words[@]}" >/dev/null 2>&1 & ;;
        x-terminal-emulator) x-terminal-emulator -T "$title" -e "${words[@]}" >/dev/null 2>&1 & ;;
        xterm) xterm -T "$title" -e "${words[@]}" >/dev/null 2>&1 & ;;
    esac
}

# ------------------------------------------------------------------------------------------ commands

command_all() {
    local windows=false status=0
    set_up
    if find_terminal >/dev/null; then windows=true; fi
    log=$RUN/kernel.log
    if ! watchdog=$(watchdog_pid); then
        if $windows; then start_in_window; else start_in_background; fi
    fi
    wait_until_live
    if $windows; then
        open_window "BAT OS Client" client
        return
    fi
    "$PY" "$HERE/chat_client.py" || status=$?
    say "The kernel goes on in the background; ./puter.sh stop ends it."
    exit $status
}

command_setup() {
    set_up
    say "BAT OS is set up; start it with: ./puter.sh"
}

command_kernel() {
    set_up
    exec "$PY" "$HERE/min_watchdog_service.py" "$@"
}

command_client() {
    set_up
    exec "$PY" "$HERE/chat_client.py" "$@"
}

command_status() {
    local pid
    need_set_up
    if "$PY" "$HERE/chat_client.py" -c /status 2>/dev/null; then return; fi
    if pid=$(watchdog_pid); then
        die "the watchdog (pid $pid) runs, but the kernel does not answer; see $RUN/kernel.log"
    fi
    say "Nothing runs in $BATOS_HOME."
    exit 1
}

command_stop() {
    local pid
    need_set_up
    if ! pid=$(watchdog_pid); then
        say "Nothing runs in $BATOS_HOME."
        return
    fi
    case $pid in
        '' | *[!0-9]*) die "run/watchdog.pid names no process; end the watchdog by hand, or with: ./puter.sh client -c /shutdown" ;;
    esac
    kill -TERM "$pid" 2>/dev/null || true  # it may have ended in this moment
    while watchdog_pid >/dev/null; do sleep 0.1; done
    say "Stopped."
}

command_inspect() {
    local image
    need_set_up
    image=$("$PY" "$HERE/config.py" DB_FILE)
    case $image in *://*) die "$image is no file; only image files can be listed" ;; esac
    [ -f "$image" ] || die "there is no living image at $image yet; start the kernel once"
    cd "$HERE"
    exec "$PY" -m uvm.image.dump "$image" "$@"
}

command_key() {
    local keys
    need_set_up
    keys=$("$PY" "$HERE/config.py" KEYS_DIR)
    cd "$HERE"
    exec "$PY" -m uvm.keys --keys-dir "$keys" "$@"
}

command_backup() { run_upkeep backup "$@"; }

command_restore() { run_upkeep restore "$@"; }

command_verify() { run_upkeep verify "$@"; }

command_pack() { run_upkeep pack "$@"; }

run_upkeep() {
    need_set_up
    exec "$PY" "$HERE/upkeep.py" "$@"
}

command_test() {
    set_up
    install_packages requirements-dev.txt
    cd "$HERE"
    summary="" failed=0
    check "ruff check" ruff check .
    check "ruff format" ruff format --check .
    check mypy mypy
    check pytest pytest "$@"
    printf '\n%s' "$summary"
    exit $failed
}

# check NAME MODULE ARGUMENT...: runs one check, whatever the others said.
check() {
    local name=$1 verdict=passed
    shift
    printf '\n== %s\n' "$name"
    "$PY" -m "$@" || { verdict=FAILED failed=1; }
    summary="$summary$verdict  $name"$'\n'
}

case ${1:-all} in
    all | setup | kernel | client | status | stop | inspect | backup | restore | verify | pack | key | test)
        command=${1:-all}
        if [ $# -gt 0 ]; then shift; fi
        "command_$command" "$@"
        ;;
    help | -h | --help) usage ;;
    *)
        usage >&2
        exit 2
        ;;
esac
