# Makes .venv beside this checkout and installs into it, once; sourced by the other scripts: . scripts/install.sh EXTRAS
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${VENV:-.venv}
done=$venv/.installed-$1-$(cksum <setup.py | cut -d' ' -f1)
if [ ! -f "$done" ]; then
    "${PYTHON:-python3}" -m venv "$venv"
    # torch first and by number, so that no later range picks another build of it
    "$venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
    "$venv/bin/pip" install --quiet --disable-pip-version-check ${CONSTRAINTS:+-c "$CONSTRAINTS"} -e ".[$1]"
    touch "$done"
fi
. "$venv/bin/activate"
