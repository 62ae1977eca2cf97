"""What an environment lacks of pyproject.toml's requirements. Used by scripts/setup.

missing.py [EXTRA...]     prints the unmet requirements, one a line
missing.py --shares-torch prints --system-site-packages if this Python has a CUDA torch
missing.py --link         makes `import weft` and the `weft` command work in this environment
"""

import importlib.metadata
import importlib.util
import re
import sys
import sysconfig
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTED_TORCH = "2.13.0"


def has_cuda_torch() -> bool:
    """Without importing torch, which takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return False
    version = Path(next(iter(spec.submodule_search_locations))) / "version.py"
    return re.search(r"^cuda\b.*=\s*['\"]", version.read_text(), re.MULTILINE) is not None


def missing(extras: list[str]) -> list[str]:
    """Requirements that are not installed or not in their range; a missing torch is pinned to the
    version the tests run with."""
    # pip is in every environment that scripts/setup makes; packaging need not be.
    from pip._vendor.packaging.requirements import Requirement
    from pip._vendor.packaging.version import Version

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    texts = list(project["dependencies"])
    for extra in extras:
        texts += project["optional-dependencies"][extra]
    unmet = []
    for text in texts:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        try:
            have = Version(importlib.metadata.version(requirement.name))
        except importlib.metadata.PackageNotFoundError:
            exact = f"torch=={TESTED_TORCH}"
            unmet.append(exact if requirement.name == "torch" else text.replace(" ", ""))
            continue
        if not requirement.specifier.contains(have, prereleases=True):
            unmet.append(text.replace(" ", ""))
    return unmet


def link() -> None:
    """A .pth file and a launcher do what an editable install does, without a build."""
    (Path(sysconfig.get_path("purelib")) / "weft-src.pth").write_text(f"{ROOT / 'src'}\n")
    launcher = Path(sysconfig.get_path("scripts")) / "weft"
    launcher.write_text(
        f"#!{sys.executable}\nimport sys\n\nfrom weft.cli.main import main\n\nsys.exit(main())\n"
    )
    launcher.chmod(0o755)


def main() -> None:
    if sys.argv[1:] == ["--shares-torch"]:
        if has_cuda_torch():
            print("--system-site-packages")
    elif sys.argv[1:] == ["--link"]:
        link()
    else:
        print("\n".join(missing(sys.argv[1:])), end="")


if __name__ == "__main__":
    main()
