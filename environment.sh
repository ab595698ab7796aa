# Sourced by run_train.sh and run_tests.sh: `environment [EXTRA]` sets PYTHON to an interpreter with the project's
# requirements (and those of the extra): $PYTHON if set; else the active interpreter if it has them; else .venv beside
# this file, which is made if it is missing, and updated if pyproject.toml or constraints.txt has changed since. With uv
# if it is installed, else with Python's own venv and pip.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

fail() {
    echo "$(basename "$0"): $*" >&2
    exit 1
}

# Prints what interpreter $1 lacks of the requirements and of the extra $2; nothing if it can run the project. Called in
# a subshell, which ignores Ctrl-C: it still ends this script, and the interpreter prints no traceback.
lacks() {
    trap '' INT
    "$1" - "$root/pyproject.toml" "${2:-}" <<'PYTHON'
import re
import sys

if sys.version_info < (3, 10):
    print("Python 3.10 or newer")
    sys.exit()

from importlib.metadata import PackageNotFoundError, version

def numbers(text):
    return [int(n) for n in re.findall(r"\d+", text.split("+")[0])[:3]]

text = open(sys.argv[1], encoding="utf-8").read()
missing = []
for block in ["dependencies"] + ([sys.argv[2]] if sys.argv[2] else []):
    for line in re.findall(r'^ +"(.+)",$', re.search(r"^%s = \[$(.*?)^\]$" % block, text, re.M | re.S).group(1), re.M):
        requirement, _, below = line.partition("; python_version < ")
        if below and list(sys.version_info[:2]) >= numbers(below):
            continue
        name, _, least = requirement.partition(">=")
        try:
            found = version(name.partition("[")[0])
        except PackageNotFoundError:
            found = ""
        if not found or numbers(found) < numbers(least):
            missing.append(requirement)
print(", ".join(missing))
PYTHON
}

# Sets base to the first interpreter of at least Python 3.10 ("" if there is none), and lack to what it lacks.
find_python() {
    local name
    for name in python3 python python3.14 python3.13 python3.12 python3.11 python3.10; do
        base=$(command -v "$name") && lack=$(lacks "$base" "${1:-}" 2>/dev/null) && [ "$lack" != "Python 3.10 or newer" ] && return
    done
    base=""
}

# Runs a command's help, which needs Python alone: nothing is installed.
print_help() {
    local base lack
    find_python
    base=${PYTHON:-$base}
    [ -n "$base" ] || fail "no Python 3.10 or newer found; install one, or set PYTHON"
    PYTHONPATH=$root exec "$base" -m torchxihe "$@" --help
}

make_venv() {
    if command -v uv >/dev/null; then
        rm -rf "$root/.venv"
        uv venv --quiet --seed --python "${base:->=3.10}" "$root/.venv" || fail "uv could not make $root/.venv (above)"
        return
    fi
    "$base" -c "import ensurepip, venv" 2>/dev/null ||
        fail "$base cannot make a virtual environment; install its venv module (Debian: apt install python3-venv)"
    "$base" -m venv --clear "$root/.venv" || fail "$base could not make $root/.venv"
}

environment() {
    local extra=${1:-} install=$root base lack stamp wanted
    [ -n "$extra" ] && install="$root[$extra]"
    export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" # this checkout's code, whatever else is installed
    if [ -n "${PYTHON:-}" ]; then
        lack=$(lacks "$PYTHON" "$extra") || fail "PYTHON=$PYTHON does not run"
        [ -z "$lack" ] || fail "PYTHON=$PYTHON lacks $lack: $PYTHON -m pip install -c '$root/constraints.txt' -e '$install'"
        return
    fi
    find_python "$extra"
    [ -n "$base" ] || command -v uv >/dev/null || fail "no Python 3.10 or newer found; install one, or set PYTHON"
    [ -z "$base" ] || [ -n "$lack" ] || { PYTHON=$base && return; }
    # One installation at a time; the nodes of a cluster may share this directory.
    exec 9<"$root"
    flock 9 2>/dev/null || true
    PYTHON=$root/.venv/bin/python stamp=$root/.venv/installed${extra:+-$extra}
    wanted=$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ] || ! "$PYTHON" -c "" 2>/dev/null; then
        echo "$(basename "$0"): installing the requirements into $root/.venv (once)"
        "$PYTHON" -c "" 2>/dev/null || make_venv
        local pip=("$PYTHON" -m pip install --disable-pip-version-check)
        if command -v uv >/dev/null; then pip=(uv pip install --python "$PYTHON"); fi
        "${pip[@]}" -c "$root/constraints.txt" -e "$install" ||
            fail "installing the requirements failed (above); fix that, or set PYTHON to an interpreter that has them"
        echo "$wanted" | tee "$stamp" >"$root/.venv/installed"
    fi
    exec 9<&-
}
