"""Turns the record of LoRA's own timing into one of `benchmarks.step_time`: run once."""

import json
from pathlib import Path
from typing import Any

from benchmarks.core import records
from benchmarks.step_time import report

FOLDER = Path("benchmarks/results/lora_time")
PARAMETERS = 76_038  # trained ones, float32: see the records of lora_trec


def migrated(old: dict[str, Any]) -> dict[str, Any]:
    """Returns the record with the method AdamW as `base` and all ratios computed by the report."""
    settings = old["settings"]
    methods = {
        "base" if name == "adamw" else name: {
            "seconds": row["seconds"],
            "ratio": {"base": row["time_ratio"]},
            "lower_seconds": None,
            "compile_seconds": row["compile_seconds"],
            "argument_bytes": row["bytes"] - row["temp_bytes"],
            "temp_bytes": row["temp_bytes"],
            "flops": row["flops"],
        }
        for name, row in old["methods"].items()
    }
    title = (
        f"{settings['model']}, LoRA of rank {settings['rank']}, batch {settings['batch_size']}, "
        f"{settings['length']} tokens (base: AdamW)"
    )
    problem = {
        "title": title,
        "rounds": settings["rounds"],
        "parameter_bytes": 4 * PARAMETERS,
        "methods": methods,
    }
    kept = {key: old[key] for key in ("format", "hardware", "versions")}
    names = ("batch_size", "length", "rank", "rounds")
    return {
        **kept,
        "settings": {"problems": ["lora"], **{name: settings[name] for name in names}},
        "targets": report.targets({"lora": problem}),
        "problems": {"lora": problem},
    }


if __name__ == "__main__":
    path = FOLDER / "results.json"
    records.write_record(path, migrated(json.loads(path.read_text())))
    (FOLDER / "lora_time.png").unlink()
    print(report.write(FOLDER))
