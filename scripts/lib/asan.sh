# A build of the core with AddressSanitizer, in a copy of the repository. Sourced by bash, after provision.sh.

asan_tree=$repository/build/asan

# build_asan: copies the repository and builds the copy's core, unless its sources are unchanged.
build_asan() {
    local sources requirements
    mkdir -p "$asan_tree"
    # what is excluded stays in the copy: its own build
    rsync -a --delete --exclude=/build --exclude=/dist --exclude=/.venv --exclude=/.git --exclude='*.so' \
        --exclude=__pycache__ --exclude='.*_cache' --exclude=/.hypothesis "$repository/" "$asan_tree/"
    sources=$(cd "$asan_tree" && cat setup.py unionfs/core/*.px[di] unionfs/core/*.pyx | sha256sum)
    [ "$(cat "$asan_tree/build/sources" 2>/dev/null)" != "$sources" ] || return 0
    echo "Building the core with AddressSanitizer"
    # pip has them in an environment of its own when it builds the project
    mapfile -t requirements < <("$venv/bin/python" -c 'import tomllib
print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")')
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check "${requirements[@]}" ||
        die "pip could not install what builds the core; its messages are above"
    rm -f "$asan_tree"/unionfs/core/*.so
    (cd "$asan_tree" && UNIONFS_CORE=asan "$venv/bin/python" setup.py -q build_ext --inplace --parallel "$(nproc)" \
        >build.log 2>&1) || die "the core cannot be built; see $asan_tree/build.log"
    mkdir -p "$asan_tree/build"
    printf '%s\n' "$sources" >"$asan_tree/build/sources"
}

# with_asan COMMAND...: runs a command in the copy. Fails if any process reported an error, also a daemon whose
# exit code nobody sees. PYTHONMALLOC: Python's own allocator would hide errors in its objects.
with_asan() {
    local status=0 runtime reports
    runtime=$(gcc -print-file-name=libasan.so)
    reports=$(mktemp -d "$repository/build/asan-reports.XXXXXX")
    chmod 1777 "$reports" # for daemons of other users
    (
        cd "$asan_tree"
        export PYTHONPATH=$asan_tree PYTHONMALLOC=malloc UNIONFS_TEST_SLOWNESS=${UNIONFS_TEST_SLOWNESS:-3}
        export ASAN_OPTIONS=detect_leaks=0:handle_segv=2:allocator_may_return_null=1:log_path=$reports/report
        exec env LD_PRELOAD="$runtime" "$@"
    ) || status=$?
    if ! rmdir "$reports" 2>/dev/null; then
        cat "$reports"/* >&2
        echo "AddressSanitizer reported errors; they are in $reports" >&2
        status=1
    fi
    return "$status"
}
