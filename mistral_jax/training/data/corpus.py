"""A corpus: the Python source that is installed on this machine, as documents.

The standard library and the project's runtime requirements are on every machine that can run the
project, and their licences are permissive, so anyone can gather the same kind of corpus.
"""

import dataclasses
import hashlib
import importlib.metadata
import re
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

STANDARD_LIBRARY = "python"

_PERMISSIVE = re.compile(r"\b(MIT|BSD|Apache|PSF|ISC)\b", re.IGNORECASE)
_RESTRICTIVE = re.compile(r"\b(GPL|LGPL|AGPL|MPL|Mozilla)", re.IGNORECASE)
_SKIPPED_FOLDERS = {
    "test",
    "tests",
    "testing",
    "_vendor",
    "site-packages",
    "idle_test",
    "test_data",
}
_SKIPPED_FILES = re.compile(r"(_pb2|_gen|_test|/test_[^/]*|/conftest)\.py$")
_GENERATED = re.compile(
    r"generated (by|from|file)|auto-?generated|do not (edit|modify)", re.IGNORECASE
)
_LONGEST_LINE = 300
_SIZES = range(200, 300_000)
_VALIDATION_SHARE = 200  # one document of this many is for validation


@dataclasses.dataclass(frozen=True)
class Source:
    """One part of a corpus: the standard library, or an installed distribution.

    Attributes:
      name: name of the distribution, or "python" for the standard library.
      version: version of the distribution, or of Python.
      license: licence that its metadata states.
      files: text of each document, by path.
    """

    name: str
    version: str
    license: str
    files: dict[str, str]

    def summary(self) -> dict[str, str | int]:
        """Returns the metadata, the number of files and their bytes, as JSON values."""
        size = sum(len(text.encode()) for text in self.files.values())
        about = {"name": self.name, "version": self.version, "license": self.license}
        return {**about, "files": len(self.files), "bytes": size}


def gather(roots: Sequence[str]) -> list[Source]:
    """Reads the Python source of distributions and of their runtime requirements.

    Tests, vendored copies, generated files and tables of data are left out. A text that occurs
    twice is kept once.

    Args:
      roots: names of installed distributions; "python" is the standard library.

    Raises:
      ValueError: a root is not installed, a licence is not permissive, or no file remains.
    """
    seen: set[bytes] = set()
    sources = []
    for name in _with_requirements(roots):
        if name == STANDARD_LIBRARY:
            version, license_, paths = sysconfig.get_python_version(), "PSF-2.0", _library_paths()
        else:
            distribution = importlib.metadata.distribution(name)
            version, license_ = distribution.version, _license(distribution)
            paths = _distribution_paths(distribution)
        files = dict(_documents(paths, seen))
        if files:
            sources.append(Source(name, version, license_, files))
    if not sources:
        raise ValueError(f"the corpus of {list(roots)} is empty: no Python source was found")
    return sources


def split(source: str, files: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Splits a source's files into training and validation texts, by a hash of their names."""
    parts = [], []
    for name, text in files.items():
        digest = hashlib.sha256(f"{source}/{name}".encode()).digest()
        parts[int.from_bytes(digest[:8], "big") % _VALIDATION_SHARE == 0].append(text)
    return parts


def normal_name(name: str) -> str:
    """Returns the normalised name of a distribution: "Foo_Bar" and "foo.bar" are "foo-bar"."""
    return re.sub(r"[-_.]+", "-", name).lower()


def python_files(name: str) -> dict[str, str]:
    """Reads the documents of one distribution under any licence, for evaluation only."""
    return dict(_documents(_distribution_paths(importlib.metadata.distribution(name)), set()))


def _with_requirements(roots: Iterable[str]) -> list[str]:
    found: dict[str, None] = {}
    waiting = [(name, True) for name in roots]
    while waiting:
        name, is_root = waiting.pop()
        name = normal_name(name)
        if name in found:
            continue
        requirements = []
        if name != STANDARD_LIBRARY:
            try:
                requirements = importlib.metadata.distribution(name).requires or []
            except importlib.metadata.PackageNotFoundError:
                if is_root:
                    raise ValueError(
                        f"the corpus names {name!r}, which is not installed: pip install {name}"
                    ) from None
                continue  # a requirement of another platform or Python
        found[name] = None
        waiting += [
            (re.match(r"[\w.-]+", requirement)[0], False)
            for requirement in requirements
            if not re.search(r"\bextra\s*==", requirement)
        ]
    return sorted(found)


def _license(distribution: importlib.metadata.Distribution) -> str:
    metadata = distribution.metadata
    classifiers = [c for c in metadata.get_all("Classifier") or [] if c.startswith("License ::")]
    first_line = (metadata.get("License") or "").strip().partition("\n")[0]
    stated = metadata.get("License-Expression") or "; ".join(
        [c.rpartition(" :: ")[2] for c in classifiers] or [first_line]
    )
    if not _PERMISSIVE.search(stated) or _RESTRICTIVE.search(stated):
        raise ValueError(
            f"the corpus would hold {distribution.name}, whose licence is {stated!r}; expected a "
            "permissive one (MIT, BSD, Apache, PSF or ISC): leave out the distributions "
            "that need it"
        )
    return stated


def _library_paths() -> Iterator[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in root.rglob("*.py"):
        yield path.relative_to(root).as_posix(), path


def _distribution_paths(
    distribution: importlib.metadata.Distribution,
) -> Iterator[tuple[str, Path]]:
    for file in distribution.files or []:
        if file.suffix == ".py":
            yield file.as_posix(), Path(distribution.locate_file(file))


def _documents(paths: Iterable[tuple[str, Path]], seen: set[bytes]) -> Iterator[tuple[str, str]]:
    for name, path in sorted(paths):
        if _SKIPPED_FOLDERS.intersection(name.split("/")) or _SKIPPED_FILES.search(name):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if digest not in seen and is_prose(text):
            seen.add(digest)
            yield name, text


def is_prose(text: str) -> bool:
    """Returns whether people wrote a source text: it is neither generated nor a table of data."""
    if len(text) not in _SIZES or _GENERATED.search(text[:2000]):
        return False
    lines = text.splitlines()
    if max(map(len, lines)) > _LONGEST_LINE:
        return False
    visible = [c for c in text if not c.isspace()]
    letters = sum(c.isalpha() or c == "_" for c in visible)
    return letters > 0.6 * len(visible) and len(set(lines)) > 0.5 * len([x for x in lines if x])
