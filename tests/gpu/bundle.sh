#!/usr/bin/env bash
# Packs a full pmpd, its libraries, the embedded model and the device test into one folder that runs on a
# bare GPU machine with the same C library or a newer one: tests/gpu/bundle.sh [BUILD] [OUT]; there:
# OUT/run.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
build=${1:-build} out=${2:-build/bundle}
[ -x "$build/pmpd" ] || { echo "tests/gpu/bundle.sh: no $build/pmpd: build it first (experiments/quickstart.sh)" >&2; exit 1; }
rm -rf "$out"
mkdir -p "$out/lib" "$out/openmpi" "$out/pmix"
cp "$build/pmpd" "$out/"
cp "$build/tests/test_ops" "$out/"
# all but the C library and the loader, which the other machine has
ldd "$build/pmpd" | awk '$2 == "=>" && $3 ~ /^\// {print $3}' | grep -vE '/(libc|libm|libpthread|libdl|librt|ld-linux[^/]*)\.so' |
    xargs -I{} cp -L {} "$out/lib/"
plugins=$(dirname "$(find /usr/lib -name 'mca_pml_ob1.so' 2>/dev/null | head -1)")
if [ -d "$plugins" ]; then
    cp -L "$plugins"/*.so "$out/openmpi/"
    for p in "$plugins"/*.so; do
        ldd "$p" | awk '$2 == "=>" && $3 ~ /^\// {print $3}' | grep -vE '/(libc|libm|libpthread|libdl|librt|ld-linux[^/]*)\.so' |
            xargs -I{} cp -Ln {} "$out/lib/" 2>/dev/null || true
    done
fi
cp -r experiments/tiny "$out/tiny"
cp tests/gpu/embedded.py "$out/"
cat > "$out/run.sh" <<'R'
#!/usr/bin/env bash
# The embedded model on the GPU of this machine against cpu_ref; needs python3 (no packages).
set -euo pipefail
cd "$(dirname "$0")"
export LD_LIBRARY_PATH=$PWD/lib:${LD_LIBRARY_PATH:-} OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export OMPI_MCA_component_path=$PWD/openmpi OMPI_MCA_mca_base_component_path=$PWD/openmpi
exec python3 embedded.py ./pmpd tiny "${1:-cuda}"
R
chmod +x "$out/run.sh"
du -sh "$out" | awk '{print "bundle: " $2 ", " $1}'
