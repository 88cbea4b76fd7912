#!/usr/bin/env bash
# Builds docker/Dockerfile without a Docker engine and without pulling an image: a fresh Debian is made with
# debootstrap, and buildah carries out every instruction in a chroot. Then the image trains the quick start for one
# epoch as its own user.
#
#   docker/check_build.sh FOLDER [OPTIONS OF buildah build]
#
# Needs root, debootstrap, buildah, about 25 GB in FOLDER and a package index. MIRROR names another one of Debian's
# mirrors; a package index of your own comes in as options, such as --volume FILE:/etc/pip.conf:ro.
set -euo pipefail
folder=$(realpath -m -- "${1:?usage: docker/check_build.sh FOLDER [OPTIONS]}")
shift
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
for tool in debootstrap buildah; do
  command -v "$tool" > /dev/null || { echo "$tool is not installed" >&2; exit 2; }
done
mkdir -p "$folder"
export TMPDIR=$folder
buildah=(buildah --root "$folder/storage" --runroot "$folder/run" --storage-driver "${STORAGE_DRIVER:-overlay}")

if [[ ! -e $folder/debian/etc/debian_version ]]; then
  debootstrap --variant=minbase bookworm "$folder/debian" ${MIRROR:+"$MIRROR"}
fi
if ! "${buildah[@]}" inspect --type image localhost/debian:base > /dev/null 2>&1; then
  container=$("${buildah[@]}" from scratch)
  "${buildah[@]}" add --quiet "$container" "$folder/debian" /
  "${buildah[@]}" commit --quiet --rm "$container" localhost/debian:base
fi

"${buildah[@]}" build --isolation=chroot --pull-never --layers --network=host --format=docker \
  --build-arg=DEBIAN=localhost/debian:base --file="$root/docker/Dockerfile" --tag=localhost/locsgd-dist:check \
  --ignorefile="$root/docker/Dockerfile.dockerignore" "$@" "$root"

container=$("${buildah[@]}" from --pull-never localhost/locsgd-dist:check)
trap '"${buildah[@]}" rm "$container" > /dev/null' EXIT
# chroot isolation runs a command, not the entry point: both are taken from the image's configuration.
read -r -a entrypoint <<< "$("${buildah[@]}" inspect --format '{{range .OCIv1.Config.Entrypoint}}{{.}} {{end}}' "$container")"
read -r -a command <<< "$("${buildah[@]}" inspect --format '{{range .OCIv1.Config.Cmd}}{{.}} {{end}}' "$container")"
"${buildah[@]}" run --isolation=chroot --network=host "$container" -- \
  "${entrypoint[@]}" "${command[@]}" --train.epochs=1 --data.workers=0
"${buildah[@]}" run --isolation=chroot "$container" -- \
  bash -euc 'id -u; test -s runs/quickstart/report.html; locsgd launch local --gpus-per-node=0 --dry-run'
echo "check_build: every instruction of docker/Dockerfile ran, and the image trains"
