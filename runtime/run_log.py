"""The log of a training run: metrics.jsonl, validation_epoch_N.json, the progress bar and the dashboard."""

import math
import os
import sys
import time

from tqdm import tqdm

from runtime import ranks
from runtime.cli import note
from runtime.files import json_line, parse_json_lines, write_atomic, write_json
from runtime.names import first_few

SHOWN = 2  # example captions to print after each evaluation


class Log:
    """Logs progress to stderr, metrics.jsonl and the dashboard, on rank 0 only.

    Opening the log deletes the lines of steps after `step`, the step of the checkpoint.
    """

    def __init__(self, folder, step, total, dashboard):
        self.folder, self.start_time, self.quiet = folder, time.perf_counter(), ranks.rank() > 0
        self.dashboard = dashboard
        if self.quiet:
            return
        kept = truncate_log(folder / "metrics.jsonl", step)
        self.skipped = sum("skipped" in entry for entry in kept)
        self.metrics = open(folder / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115 (closed in `close`)
        self.bar = tqdm(total=total, initial=step, unit="step", smoothing=0.1)

    def close(self):
        if self.quiet:
            return
        for file in (self.metrics, self.bar, self.dashboard):
            file.close()
        if self.skipped:
            note(f"steps skipped: {self.skipped}, see {self.folder / 'metrics.jsonl'}")

    def sync(self):
        if not self.quiet:
            os.fsync(self.metrics.fileno())

    def step(self, step, epoch, ids, loss, tokens, by_style, lr, grad_norm, data_seconds, memory):
        """Log one training step.

        epoch: from 0. loss: the sum over `tokens` caption tokens of the clips `ids`. by_style: the mean
        loss per token of each style. grad_norm: before clipping. data_seconds: the part of the step's
        duration spent waiting for data. memory: peak GPU memory so far in bytes, or 0.
        """
        if self.quiet:
            return
        seconds, self.start_time = time.perf_counter() - self.start_time, time.perf_counter()
        mean = loss / tokens
        losses = {"loss": mean} | {f"loss_{style}": value for style, value in by_style.items()}
        entry = {
            "step": step,
            "epoch": epoch + 1,
            **{k: v if math.isfinite(v) else None for k, v in losses.items()},
            "lr": lr,
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            "tokens": tokens,
            "seconds": round(seconds, 4),
            "data_seconds": round(data_seconds, 4),
            "clips_per_second": round(len(ids) / seconds, 2),
        }
        if memory:
            entry["gpu_gb"] = round(memory / 1e9, 2)
        if entry["loss"] is None or entry["grad_norm"] is None:
            entry["skipped"] = ids
            self.skipped += 1
            some = first_few(ids, 8)
            self.print(f"step {step} skipped: loss or gradient is not finite (clips {some})")
        self.metrics.write(json_line(entry))
        self.metrics.flush()
        shown = (*losses, "lr", "grad_norm", "clips_per_second", "data_seconds", "gpu_gb")
        shown = {f"train/{k}": entry.get(k) for k in shown}
        self.dashboard.log(step, {k: v for k, v in shown.items() if v is not None})
        text = f"loss {mean:.3f}, lr {lr:.1e}, {len(ids) / seconds:.0f} clip/s"
        text += f", data {100 * data_seconds / seconds:.0f} %" + (
            f", GPU {memory / 1e9:.1f} GB" if memory else ""
        )
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()

    def evaluation(self, step, epoch, loss, result, samples):
        """Log an evaluation and write validation_epoch_N.json.

        epoch: from 1. loss: the validation loss or None. samples: example captions to store.
        """
        if self.quiet:
            return
        head = {"epoch": epoch, "step": step, "loss": loss}
        path = self.folder / f"validation_epoch_{epoch}.json"
        write_json(path, head | result | {"samples": samples})
        values = {"loss": loss} if loss is not None else {}
        self.dashboard.log(
            step, {f"validation/{k}": v for k, v in (values | result["metrics"]).items()}
        )
        values |= {
            k: v for k, v in result["metrics"].items() if k in ("CIDEr", "template_accuracy")
        }
        text = ", ".join(f"{k} {v:.3f}" for k, v in values.items())
        lines = [f"epoch {epoch}: validation {text}"]
        for sample in samples[:SHOWN]:
            lines.append("  {id}: {prediction!r}, reference {reference!r}".format(**sample))
        self.print("\n".join(lines))  # in one call, since the bar is drawn again after each
        self.start_time = time.perf_counter()

    def print(self, text):
        self.bar.write(text, file=sys.stderr)


def truncate_log(path, step):
    """Delete all lines except valid ones of steps up to `step`. Returns the remaining entries."""
    entries = parse_json_lines(path.read_bytes()) if path.is_file() else []
    kept = [e for e in entries if type(e.get("step")) is int and e["step"] <= step]
    write_atomic(path, "".join(map(json_line, kept)))
    return kept
