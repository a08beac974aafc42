"""How loading and checking grows with the catalog: `python tests/tools/scale.py [N]`, by default 1000 entries.

The entries are copies of the real ones under new ids, so their size is the real one's.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path

from requant.catalog.loader import default_folders, load_catalog


def copies(folder: Path, n: int) -> Path:
    """A folder of `n` entries below `folder`: the catalog's own, then copies of them."""
    source = default_folders()
    papers = folder / "papers"
    papers.mkdir()
    shutil.copytree(source.vocab, folder / "catalog" / "vocab")
    shutil.copytree(source.impls, folder / "reference_impls")
    entries = sorted(source.papers.glob("*.yaml"))
    for index in range(n):
        path = entries[index % len(entries)]
        name = path.stem if index < len(entries) else f"{path.stem}_{index}"
        shutil.copyfile(path, papers / f"{name}.yaml")
    return papers


def main() -> None:
    """Print seconds of processor time for a quarter, a half and all of the entries."""
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    with tempfile.TemporaryDirectory() as folder:
        papers = copies(Path(folder), n)
        names = sorted(path.stem for path in papers.glob("*.yaml"))
        for count in (n // 4, n // 2, n):
            began = time.process_time()
            catalog = load_catalog(papers, ids=set(names[:count]))
            seconds = time.process_time() - began
            each = 1000 * seconds / max(1, count)
            line = f"{count:5d} entries {seconds:6.2f} s, {each:5.1f} ms each, {len(catalog.errors)} errors"
            sys.stdout.write(line + "\n")


if __name__ == "__main__":
    main()
