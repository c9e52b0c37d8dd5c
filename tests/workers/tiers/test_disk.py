"""Real files: what a next process finds, and what it does not, whatever was done to them."""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import google_crc32c
import pytest
import torch
from torch import Tensor

from seamount.wire.errors import DataLoss, InvalidArgument
from seamount.wire.hashes import page_hashes, root_hash
from seamount.workers.cache.prefix import PageNode
from seamount.workers.tiers.checksum import crc32c
from seamount.workers.tiers.disk import DiskFile, identity_of

SIZE = 8
"""Tokens in a page here."""
IMAGE_BYTES = 5000
STRIDE = 8192
ROOT = root_hash(b"salt", "f", "l")


def identity(**changes: object) -> bytes:
    return identity_of(**({"fingerprint": "f", "layout": "l", "num_layers": 2, "page_size": SIZE} | changes))  # type: ignore[arg-type]


Open = Callable[..., DiskFile]


@pytest.fixture
def open_disk(tmp_path: Path) -> Iterator[Open]:
    made: list[DiskFile] = []

    def open_one(*, num_bytes: int = 200_000, **changes: object) -> DiskFile:
        disk = DiskFile.open(
            tmp_path,
            identity=identity(**changes),
            image_bytes=IMAGE_BYTES,
            page_size=SIZE,
            num_bytes=num_bytes,
        )
        made.append(disk)
        return disk

    yield open_one
    for disk in made:
        disk.close()


def chain(rng: random.Random, num_pages: int, session_id: str = "s") -> list[PageNode]:
    ids = [rng.randrange(1 << 17) for _ in range(num_pages * SIZE)]
    nodes: list[PageNode] = []
    for depth, digest in enumerate(page_hashes(ROOT, ids, SIZE)):
        packed = b"".join(one.to_bytes(4, "little") for one in ids[depth * SIZE : (depth + 1) * SIZE])
        parent = nodes[-1] if nodes else None
        nodes.append(
            PageNode(
                page=None,
                digest=digest,
                parent=parent,
                token_ids=packed,
                session_id=session_id,
                root=ROOT,
                depth=depth,
            )
        )
    return nodes


def image_of(slot: int) -> Tensor:
    return torch.randint(0, 256, (IMAGE_BYTES,), dtype=torch.uint8, generator=torch.Generator().manual_seed(slot))


def fill(disk: DiskFile, nodes: list[PageNode]) -> None:
    for slot, node in enumerate(nodes):
        disk.write(slot, node, image_of(slot), crc32c(image_of(slot)))


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))


def test_checksums_are_those_of_the_standard(rng: random.Random) -> None:
    digits = torch.tensor(list(b"123456789"), dtype=torch.uint8)
    assert crc32c(digits) == 0xE3069283
    data = rng.randbytes((2 << 20) + 17)
    assert crc32c(torch.frombuffer(bytearray(data), dtype=torch.uint8)) == google_crc32c.value(data)


def test_the_next_process_finds_what_was_written(open_disk: Open, rng: random.Random) -> None:
    first, nodes = open_disk(), chain(rng, 5, "session-ü")
    fill(first, nodes)
    first.close()
    second = open_disk()
    assert second.folder == first.folder
    found = list(second.stored())
    assert [page.slot for page in found] == list(range(5))
    for page, node in zip(found, nodes, strict=True):
        assert (page.digest, page.depth, page.token_ids) == (node.digest, node.depth, node.token_ids)
        assert (page.session_id, page.root) == ("session-ü", ROOT)
        assert page.parent == (ROOT if node.parent is None else node.parent.digest)
        image = torch.empty(IMAGE_BYTES, dtype=torch.uint8)
        second.read(page.slot, image)
        assert crc32c(image) == page.crc
        assert torch.equal(image, image_of(page.slot))
    assert sorted(page.order for page in found) == [page.order for page in found]
    second.write(0, nodes[0], image_of(9), 1)
    (again,) = [page for page in second.stored() if page.slot == 0]
    assert again.order > found[-1].order, "order goes on growing"


def test_two_processes_do_not_share_a_folder(open_disk: Open, rng: random.Random) -> None:
    first = open_disk()
    fill(first, chain(rng, 2))
    second = open_disk()
    assert second.folder != first.folder
    assert list(second.stored()) == []
    first.close()
    second.close()
    assert open_disk().folder == first.folder, "the one with pages first"


def test_a_process_that_was_killed_holds_no_folder(open_disk: Open, tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from seamount.workers.tiers.disk import DiskFile\n"
        f"DiskFile.open(Path(sys.argv[1]), identity=bytes.fromhex(sys.argv[2]), image_bytes={IMAGE_BYTES}, "
        f"page_size={SIZE}, num_bytes=200000)\n"
        "print('held', flush=True); time.sleep(60)"
    )
    arguments = [sys.executable, "-c", script, str(tmp_path), identity().hex()]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        other = open_disk()
        assert other.folder.name == "1"
        holder.kill()
        holder.wait()
    assert open_disk().folder.name == "0"


@pytest.mark.parametrize(
    "changes", [{"fingerprint": "g"}, {"layout": "m"}, {"num_layers": 3}], ids=["model", "layout", "layers"]
)
def test_pages_of_another_model_are_not_seen(open_disk: Open, rng: random.Random, changes: dict[str, object]) -> None:
    first = open_disk()
    fill(first, chain(rng, 3))
    first.close()
    other = open_disk(**changes)
    assert other.folder.parent != first.folder.parent
    assert list(other.stored()) == []


@pytest.mark.parametrize("at", [0, 9, 30], ids=["magic", "version", "identity"])
def test_a_folder_of_an_unknown_format_begins_anew(open_disk: Open, rng: random.Random, at: int) -> None:
    first = open_disk()
    fill(first, chain(rng, 3))
    first.close()
    flip(first.folder / "index.dat", at)
    second = open_disk()
    assert second.folder == first.folder
    assert list(second.stored()) == []
    assert (second.folder / "pages.dat").stat().st_size == 0
    fill(second, chain(rng, 3))
    assert len(list(second.stored())) == 3


def test_a_flipped_bit_in_the_index_loses_that_page(open_disk: Open, rng: random.Random) -> None:
    first = open_disk()
    fill(first, chain(rng, 5))
    first.close()
    record_bytes = ((first.folder / "index.dat").stat().st_size - 4096) // first.num_pages
    flip(first.folder / "index.dat", 4096 + 2 * record_bytes + rng.randrange(record_bytes))
    second = open_disk()
    assert [page.slot for page in second.stored()] == [0, 1, 3, 4]
    assert [page.slot for page in second.stored()] == [0, 1, 3, 4], "cleared: not told twice"


def test_a_flipped_bit_in_an_image_does_not_match(open_disk: Open, rng: random.Random) -> None:
    disk = open_disk()
    fill(disk, chain(rng, 3))
    flip(disk.folder / "pages.dat", STRIDE + rng.randrange(IMAGE_BYTES))
    image = torch.empty(IMAGE_BYTES, dtype=torch.uint8)
    matches = []
    for page in disk.stored():
        disk.read(page.slot, image)
        matches.append(crc32c(image) == page.crc)
    assert matches == [True, False, True]


def test_a_truncated_file_loses_what_lay_behind(open_disk: Open, rng: random.Random) -> None:
    first = open_disk()
    fill(first, chain(rng, 4))
    os.truncate(first.folder / "pages.dat", 2 * STRIDE + IMAGE_BYTES - 1)
    with pytest.raises(DataLoss):
        first.read(2, torch.empty(IMAGE_BYTES, dtype=torch.uint8))
    first.close()
    assert [page.slot for page in open_disk().stored()] == [0, 1]


def test_a_write_that_was_cut_short_leaves_a_free_slot(open_disk: Open, rng: random.Random) -> None:
    """The limit on file sizes ends the second image in the middle, as a full disk does."""
    disk, nodes = open_disk(), chain(rng, 2)
    fill(disk, nodes)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (STRIDE + 1000, old[1]))
    try:
        with pytest.raises(OSError, match="large"):
            disk.write(1, nodes[1], image_of(7), crc32c(image_of(7)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    disk.close()
    assert [page.slot for page in open_disk().stored()] == [0]


def test_nothing_is_left_of_what_was_erased(open_disk: Open, rng: random.Random) -> None:
    disk = open_disk()
    nodes = chain(rng, 3, "ses_told")
    fill(disk, nodes)
    disk.erase(1)
    pages, index = (disk.folder / name for name in ("pages.dat", "index.dat"))
    assert pages.read_bytes()[STRIDE : STRIDE + IMAGE_BYTES] == bytes(IMAGE_BYTES)
    assert pages.stat().st_size > 2 * STRIDE, "those behind it stay where they are"
    assert nodes[1].token_ids not in index.read_bytes()
    disk.erase(disk.num_pages - 1)  # nothing was ever there
    disk.close()
    again = open_disk()
    assert sorted(page.slot for page in again.stored()) == [0, 2]
    into = torch.empty(IMAGE_BYTES, dtype=torch.uint8)
    again.read(2, into)
    assert torch.equal(into, image_of(2))


def test_files_stay_within_their_bound(open_disk: Open, rng: random.Random) -> None:
    disk = open_disk(num_bytes=100_000)
    fill(disk, chain(rng, disk.num_pages))
    used = sum((disk.folder / name).stat().st_size for name in ("index.dat", "pages.dat"))
    assert 80_000 < used <= 100_000
    disk.close()
    smaller = open_disk(num_bytes=50_000)
    assert [page.slot for page in smaller.stored()] == list(range(smaller.num_pages))
    assert sum((disk.folder / name).stat().st_size for name in ("index.dat", "pages.dat")) <= 50_000
    smaller.close()
    assert open_disk(num_bytes=1000).num_pages == 0


def test_only_the_owner_can_read(open_disk: Open) -> None:
    disk = open_disk()
    assert disk.folder.stat().st_mode & 0o777 == 0o700
    for name in ("index.dat", "pages.dat", "lock"):
        assert (disk.folder / name).stat().st_mode & 0o777 == 0o600


def test_a_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidArgument, match="cannot be used") as refused:
        DiskFile.open(tmp_path / "file", identity=identity(), image_bytes=1, page_size=SIZE, num_bytes=1)
    assert refused.value.field == "cache.disk_cache_dir"
