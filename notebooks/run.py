"""Executes the notebooks: `python -m notebooks.run` in place, with `--check` without writing them.

Any cell that raises ends it. What is kept is source and outputs: no times, no machine, no versions.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent


def execute(path: Path) -> nbformat.NotebookNode:
    """Returns the notebook with fresh outputs.

    Args:
        path: Of the notebook.

    Raises:
        nbclient.exceptions.CellExecutionError: If a cell raises.
    """
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    # From the folder of this process, where the kernel's sockets are.
    resources = {"metadata": {"path": "."}}
    client = NotebookClient(notebook, timeout=600, resources=resources, coalesce_streams=True)
    manager = client.create_kernel_manager()
    # Needs no port. Sockets of its own, for another process that runs notebooks in this folder.
    manager.transport, manager.ip = "ipc", f"kernel-{os.getpid()}"
    client.execute()
    for cell in notebook.cells:
        cell.metadata = nbformat.NotebookNode()
    notebook.metadata.pop("widgets", None)
    notebook.metadata.language_info = nbformat.from_dict({"name": "python"})
    return notebook


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m notebooks.run")
    parser.add_argument("names", nargs="*", help="beginnings of names, such as 03; default: all")
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    paths = sorted(FOLDER.glob("*.ipynb"))
    chosen = [p for p in paths if not arguments.names or p.name.startswith(tuple(arguments.names))]
    if not chosen:
        parser.error(f"no notebook begins with {' or '.join(arguments.names)}")
    for path in chosen:
        start = time.monotonic()
        notebook = execute(path)
        if not arguments.check:
            nbformat.write(notebook, path)
        print(f"{path.name}: {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
