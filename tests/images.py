"""Images for the tests, made without an image registry: Python from Debian's packages, and what is copied onto it.

Where there is no apt, the base is what a user's Dockerfile begins with, pulled.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

PACKAGES = (
    *("python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib", "libc6", "libgcc-s1", "libstdc++6"),
    *("libexpat1", "zlib1g", "libbz2-1.0", "liblzma5", "libffi8", "libssl3", "libcrypt1", "libsqlite3-0", "libuuid1"),
    *("libreadline8", "libtinfo6", "libncursesw6", "libdb5.3", "libtirpc3", "libnsl2", "media-types", "busybox-static"),
    *("libgomp1", "ca-certificates"),
)
PULLED_BASE = "python:3.11-slim"
ROOT = Path(__file__).parent.parent
SERVER = Path(__file__).with_name("stage_server.py")


def base_image(engine: str) -> str:
    """The name of an image with Python 3.11 and a shell; made if the engine has it not."""
    name = f"batchpipe-test-base:{_digest(*map(str.encode, PACKAGES))}"
    if has_image(engine, name):
        return name
    if not shutil.which("apt-get"):
        run(engine, "pull", PULLED_BASE)
        run(engine, "tag", PULLED_BASE, name)
        return name
    with tempfile.TemporaryDirectory() as folder:
        import_root(engine, unpack_packages(Path(folder)), name)
    return name


def stage_image(engine: str) -> str:
    """The name of an image that runs `stage_server.py` as a SageMaker image runs its server."""
    base = base_image(engine)
    name = f"batchpipe-test-stage:{_digest(base.encode(), SERVER.read_bytes())}"
    if not has_image(engine, name):
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(SERVER, folder)
            dockerfile = f'FROM {base}\nCOPY stage_server.py /\nENTRYPOINT ["python3", "/stage_server.py"]\n'
            (Path(folder) / "Dockerfile").write_text(dockerfile)
            build(engine, name, Path(folder))
    return name


def job_base_image(engine: str) -> str:
    """The name of a base on which a Dockerfile's `pip install` of batchpipe and its examples fetches nothing."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [*project["dependencies"], *project["optional-dependencies"]["examples"], "hatchling", "pip"]
    name = f"batchpipe-test-job-base:{_digest(*map(str.encode, [*PACKAGES, *requirements]))}"
    if has_image(engine, name):
        return name
    if not shutil.which("apt-get"):
        return PULLED_BASE
    with tempfile.TemporaryDirectory() as folder:
        root = unpack_packages(Path(folder))
        target = [f"--target={root}/packages", "--python-version=3.11", "--only-binary=:all:"]
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *target, *requirements], check=True)
        # pip reads "no isolation" the wrong way round: 0 is yes.
        import_root(engine, root, name, PYTHONPATH="/packages", PIP_NO_INDEX="1", PIP_NO_BUILD_ISOLATION="0")
    return name


def build(engine: str, name: str, context: Path, dockerfile: str = "Dockerfile", **arguments: str) -> None:
    """Build an image by the engine's classic builder, which needs no registry for its base."""
    given = [f"--build-arg={key}={value}" for key, value in arguments.items()]
    run(engine, "build", "--quiet", f"--tag={name}", f"--file={context / dockerfile}", *given, str(context))


def unpack_packages(folder: Path) -> Path:
    """Fetch Debian's packages and unpack them into one root, with the links that their scripts would have made."""
    archives, root = folder / "archives", folder / "root"
    archives.mkdir()
    root.mkdir()
    subprocess.run(["apt-get", "download", "-qq", *PACKAGES], cwd=archives, check=True, capture_output=True)
    for archive in sorted(archives.iterdir()):
        subprocess.run(["dpkg-deb", "-x", archive, root], check=True)
    for name in ("python", "python3"):
        (root / "usr/bin" / name).unlink(missing_ok=True)
        (root / "usr/bin" / name).symlink_to("python3.11")
    (root / "bin").mkdir(exist_ok=True)
    for name in ("sh", "ls", "cat", "cp", "mkdir", "rm", "env", "sleep"):
        (root / "bin" / name).symlink_to("busybox")
    (root / "usr/lib/python3.11/EXTERNALLY-MANAGED").unlink(missing_ok=True)
    (root / "tmp").mkdir(mode=0o1777, exist_ok=True)
    (root / "tmp").chmod(0o1777)
    (root / "etc").mkdir(exist_ok=True)
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    return root


def import_root(engine: str, root: Path, name: str, **environment: str) -> None:
    """Make an image of a folder."""
    changes = [
        f"--change=ENV {key}={value}" for key, value in {"PATH": "/usr/local/bin:/usr/bin:/bin", **environment}.items()
    ]
    with subprocess.Popen(["tar", "-C", root, "-c", "."], stdout=subprocess.PIPE) as tar:
        subprocess.run([engine, "import", *changes, "-", name], stdin=tar.stdout, check=True, capture_output=True)


def has_image(engine: str, name: str) -> bool:
    return subprocess.run([engine, "image", "inspect", name], capture_output=True, check=False).returncode == 0


def run(engine: str, *arguments: str) -> str:
    """Run a command of the engine; what it says is in the error if it fails."""
    done = _run(engine, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def try_to(engine: str, *arguments: str) -> str:
    """Run a command of the engine on what may be gone by now; what it says, where it fails."""
    done = _run(engine, *arguments)
    return done.stderr if done.returncode else ""


def _run(engine: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "DOCKER_BUILDKIT": "0"}
    return subprocess.run([engine, *arguments], capture_output=True, text=True, check=False, env=environment)


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]
