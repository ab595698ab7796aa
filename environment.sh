# Sourced by run_train.sh and run_tests.sh: `environment [EXTRA]` sets PYTHON to an interpreter with the project's
# requirements (and those of the extra): $PYTHON if set; else the active interpreter if it has them; else .venv beside
# this file, made and filled where it is missing or where pyproject.toml or constraints.txt has changed since.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

fail() {
    echo "$(basename "$0"): $*" >&2
    exit 1
}

# Prints what interpreter $1 lacks of the requirements and of the extra $2; nothing when it can run the project. Called
# in a subshell: there Ctrl-C is ignored, which ends this script all the same, and the interpreter has no traceback.
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

environment() {
    local extra=${1:-} install=$root name base lack stamp wanted
    [ -n "$extra" ] && install="$root[$extra]"
    export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" # this checkout's code, whatever else is installed
    if [ -n "${PYTHON:-}" ]; then
        lack=$(lacks "$PYTHON" "$extra") || fail "PYTHON=$PYTHON does not run"
        [ -z "$lack" ] || fail "PYTHON=$PYTHON lacks $lack: $PYTHON -m pip install -c $root/constraints.txt -e '$install'"
        return
    fi
    for name in python3 python python3.14 python3.13 python3.12 python3.11 python3.10; do
        base=$(command -v "$name") && lack=$(lacks "$base" "$extra" 2>/dev/null) && [ "$lack" != "Python 3.10 or newer" ] && break
        base=""
    done
    [ -n "$base" ] || fail "no Python 3.10 or newer found; install one, or set PYTHON"
    [ -n "$lack" ] || { PYTHON=$base && return; }
    # One installation at a time; the nodes of a cluster may share this directory.
    exec 9<"$root"
    flock 9 2>/dev/null || true
    PYTHON=$root/.venv/bin/python stamp=$root/.venv/installed${extra:+-$extra}
    wanted=$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ] || ! "$PYTHON" -c "" 2>/dev/null; then
        echo "$(basename "$0"): installing the requirements into $root/.venv (once)"
        if ! "$PYTHON" -c "" 2>/dev/null; then
            "$base" -c "import ensurepip, venv" 2>/dev/null ||
                fail "$base cannot make a virtual environment; install its venv module (Debian: apt install python3-venv)"
            "$base" -m venv --clear "$root/.venv" || fail "$base could not make $root/.venv"
        fi
        "$PYTHON" -m pip install --disable-pip-version-check -c "$root/constraints.txt" -e "$install" ||
            fail "pip could not install the requirements (above); mend that, or set PYTHON to an interpreter that has them"
        echo "$wanted" | tee "$stamp" >"$root/.venv/installed"
    fi
    exec 9<&-
}
