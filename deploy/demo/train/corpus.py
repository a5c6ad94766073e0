"""Builds the training text of the demo model from files that Debian packages install.

Four domains, one UTF-8 byte stream each. A document is cut into blocks of about 4 KiB; every 20th block is held out.
Output: OUT/<domain>.train.bin, OUT/<domain>.heldout.bin (NUL between blocks) and OUT/sources.json.
"""

import glob
import gzip
import json
import os
import re
import subprocess
import sys

BLOCK_BYTES = 4096
HELDOUT_EVERY = 20
MAX_DOMAIN_BYTES = 12_000_000

PACKAGES = {
    "english": ("python3.11-doc", "PSF-2.0"),
    "code": ("libboost1.74-dev", "BSL-1.0"),
    "japanese": ("manpages-ja", "per page: GPL-2+, BSD, man-pages verbatim licences"),
    "structured": ("iso-codes", "LGPL-2.1+"),
}


def english_documents():
    """Prose paragraphs of the Python manual: no directives, no code blocks, no tables."""
    for path in sorted(glob.glob("/usr/share/doc/python3.11/html/_sources/**/*.rst.txt", recursive=True)):
        paragraphs = []
        for block in re.split(r"\n\s*\n", open(path, encoding="utf-8").read()):
            if block.startswith((" ", "\t", "..", "::", "*", "-", "|", "+", "=")) or "|" in block:
                continue
            text = " ".join(block.split())
            text = re.sub(r":[a-z:+]+:`[!~]?([^`<]*?)(?:\s*<[^`]*>)?`", r"\1", text)
            text = text.replace("``", "").replace("`", "").replace("**", "").replace("*", "")
            letters = sum(c.isalpha() or c == " " for c in text)
            if len(text) > 120 and letters > 0.9 * len(text):
                paragraphs.append(text)
        if paragraphs:
            yield "\n\n".join(paragraphs) + "\n"


def code_documents():
    """Every fourth Boost header, in path order."""
    for path in sorted(glob.glob("/usr/include/boost/**/*.hpp", recursive=True))[::4]:
        text = open(path, encoding="utf-8", errors="ignore").read()
        if len(text) < 60_000:  # generated preprocessor tables are longer
            yield text


def japanese_documents():
    """Japanese manual pages without their roff markup."""
    for path in sorted(glob.glob("/usr/share/man/ja/man*/*.gz")):
        try:
            raw = gzip.open(path).read().decode("utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        lines = []
        for line in raw.split("\n"):
            if line.startswith(("'", ".\\\"")):
                continue
            if line.startswith("."):  # keep the words of font and heading macros
                macro, _, rest = line.partition(" ")
                if macro not in (".B", ".I", ".BR", ".IR", ".RB", ".RI", ".SH", ".SS", ".BI", ".IB"):
                    continue
                line = rest.replace('"', "")
            line = re.sub(r"\\f[A-Z]|\\f\([A-Z]{2}|\\&|\\c", "", line)
            line = line.replace("\\-", "-").replace("\\(aq", "'").replace("\\(co", "(C)").replace("\\e", "\\")
            lines.append(line)
        text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"
        wide = sum(ord(c) > 0x2E80 for c in text)
        if wide > 0.25 * len(text):
            yield text


def structured_documents():
    """The JSON tables of iso-codes, as they are."""
    for path in sorted(glob.glob("/usr/share/iso-codes/json/iso_*.json")):
        yield open(path, encoding="utf-8").read()


def blocks(text: str):
    """Cuts at line ends into pieces of about BLOCK_BYTES bytes."""
    piece, size = [], 0
    for line in text.splitlines(keepends=True):
        piece.append(line)
        size += len(line.encode("utf-8"))
        if size >= BLOCK_BYTES:
            yield "".join(piece)
            piece, size = [], 0
    if piece:
        yield "".join(piece)


def main(out: str):
    os.makedirs(out, exist_ok=True)
    sources = {}
    for domain, (package, licence) in PACKAGES.items():
        documents = globals()[domain + "_documents"]()
        parts = {"train": [], "heldout": []}
        total, index = 0, 0
        for text in documents:
            for block in blocks(text.replace("\0", "")):
                data = block.encode("utf-8")
                parts["heldout" if index % HELDOUT_EVERY == HELDOUT_EVERY - 1 else "train"].append(data)
                total += len(data)
                index += 1
            if total > MAX_DOMAIN_BYTES:
                break
        if not total:
            sys.exit(f"corpus: no text for domain '{domain}': is the package {package} installed?")
        for part, pieces in parts.items():
            with open(os.path.join(out, f"{domain}.{part}.bin"), "wb") as f:
                f.write(b"\0" + b"\0".join(pieces))
        version = subprocess.run(["dpkg-query", "-W", "-f=${Version}", package], capture_output=True, text=True)
        sources[domain] = {
            "package": package,
            "version": version.stdout,
            "licence": licence,
            "train_bytes": sum(map(len, parts["train"])),
            "heldout_bytes": sum(map(len, parts["heldout"])),
        }
        print(domain, sources[domain])
    with open(os.path.join(out, "sources.json"), "w") as f:
        json.dump(sources, f, indent=1)


if __name__ == "__main__":
    main(sys.argv[1])
