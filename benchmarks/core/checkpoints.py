"""A run's checkpoints: its state and history, saved by Orbax each epoch, and the trained model."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from benchmarks.core.records import check_config


class Checkpoints:
    """Checkpoints of one run in one folder.

    Orbax writes a checkpoint aside and renames it, so a run that is killed at any moment finds
    the last complete one.
    """

    def __init__(self, folder: Path, config: dict[str, Any]):
        """Opens a run's own folder; a checkpoint there of another configuration is refused."""
        self._folder = folder
        self._config = config
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, part: int, state: Any, history: dict[str, Any]) -> None:
        """Saves the state after `part` parts and the run's history until then."""
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(jax.tree.leaves(state)),
            run=ocp.args.JsonSave({"config": self._config, "history": history}),
        )
        self._manager.save(part, args=arguments)

    def restore(self, state: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """Returns the last saved part, state and history, or None where nothing was saved.

        Raises:
            ValueError: The checkpoint belongs to another configuration.
        """
        part = self._manager.latest_step()
        if part is None:
            return None
        run = self._manager.restore(part, args=ocp.args.Composite(run=ocp.args.JsonRestore()))
        check_config(run["run"]["config"], self._config, self._folder)
        restored = _restored(
            state,
            lambda leaves: self._manager.restore(
                part, args=ocp.args.Composite(state=ocp.args.StandardRestore(leaves))
            )["state"],
        )
        return part, restored, run["run"]["history"]

    def close(self) -> None:
        """Releases Orbax's resources."""
        self._manager.close()

    def delete(self) -> None:
        """Removes the folder, once the run is recorded."""
        shutil.rmtree(self._folder, ignore_errors=True)


def save_model(folder: Path, model: Any) -> None:
    """Saves a trained model's arrays, aside and renamed; an earlier model there is replaced."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute(), jax.tree.leaves(model), force=True)


def restore_model(folder: Path, model: Any) -> Any:
    """Returns the model that `save_model` saved.

    Args:
        folder: Where it was saved.
        model: A model of its structure, shapes and dtypes; the values are not used.

    Raises:
        FileNotFoundError: There is none.
    """
    if not folder.exists():
        raise FileNotFoundError(
            f"{folder} does not exist: the run was recorded without its trained model. "
            "Repeat it: delete its record, then repeat the command that made it."
        )
    with ocp.StandardCheckpointer() as checkpointer:
        return _restored(model, lambda leaves: checkpointer.restore(folder.absolute(), leaves))


def _restored(like: Any, restore: Callable[[Any], Any]) -> Any:
    """Restores a pytree's leaves, of which the shapes and dtypes alone are used."""
    leaves, structure = jax.tree.flatten(like)
    return jax.tree.unflatten(structure, restore([*map(ocp.utils.to_shape_dtype_struct, leaves)]))
