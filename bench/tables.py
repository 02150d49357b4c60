"""Format one benchmark result as bench.md, and several as the table of docs/speed.md."""

# Figures that only some rows have. Committed results contain some that are no longer measured.
NOTES = {
    "ms_per_clip": "{:.1f} ms per clip",
    "ms_per_caption": "{:.1f} ms per caption",
    "largest_micro_batch": "up to {} clips at once fit in 24 GB",
    "bytes_at_8": "{:.3g} bytes at 8 clips with weights and optimizer",
    "memory_factor": "{:.1f} times less memory",
    "identical_captions": "{:.0%} identical captions",
    "relative_error": "{:.2%} error",
    "bottleneck": "slowest stage: {}",
    "left_out": "left out: {}",
}

LEGEND = """\
Spread: interquartile range. Factor: relative to the first row with the same unit and work. Difference: largest
absolute difference from the reference, relative to the reference's largest entry; for a training step,
relative L2 difference of the gradient. Peak memory: tensors allocated by the call, without weights. Of matmul:
FLOP/s of all matrix products, recomputation included, relative to one large matrix product; on a CPU,
fused attention is not counted. Files are read from the page cache."""


def markdown(result):
    """Format bench.md: the device and command, the table, and the equality checks."""

    def number(x):
        return "" if x is None else f"{x:,.0f}" if x >= 100 else f"{x:.3g}"

    lines = [
        f"{result['device']}; `{result['command']}`; torch {result['versions']['torch']};"
        f" large matrix product: {result['matmul_flops'] / 1e9:,.0f} GFLOP/s",
        "",
        "| group | variant | median | spread | unit | factor | difference | peak memory | of matmul | |",
        "|---|---|--:|--:|---|--:|--:|--:|--:|---|",
    ]
    for r in result["rows"]:
        memory, share = r.get("peak_bytes"), r.get("share_of_matmul")
        cells = [
            r["group"],
            f"`{r['name']}`",
            number(r["median"]),
            number(r["iqr"]),
            r["unit"],
            "" if r["factor"] is None else f"{r['factor']:.2f}",
            "" if r["max_abs_diff"] is None else f"{r['max_abs_diff']:.0e}",
            "" if memory is None else f"{memory / 1e6:,.0f} MB",
            "" if share is None else f"{share:.0%}",
            ", ".join(text.format(r[key]) for key, text in NOTES.items() if key in r),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", LEGEND, "", "Checked before timing (relative difference, tolerance):", ""]
    lines += [f"- {e['what']}: {e['found']:.1e}, {e['allowed']:g}" for e in result["equal"]]
    return "\n".join(lines)


# Rows of docs/speed.md: group and name of a result, and its figure if it is not the factor
SUMMARY = {
    "Q-Former, forward and backward: absorbed attention": ("qformer", "absorbed"),
    "memory of logits and loss: only positions with a target, in chunks": (
        *("loss", "chunked"),
        "memory_factor",
    ),
    "training, per caption: absorbed attention": ("train", "absorbed"),
    "+ int8 features, logits only at positions with a target": ("train", "chunked"),
    "+ bfloat16 throughout the language model": ("train", "bfloat16"),
    "+ 2 captions behind one prefix": ("train", "captions_2"),
    "+ 4 captions": ("train", "captions_4"),
    "+ 8 captions": ("train", "captions_8"),
    "captioning in batches of 8": ("evaluate", "shared_prefix_8"),
    "captioning in batches of 64": ("evaluate", "shared_prefix_64"),
    "captioning in batches of 256": ("evaluate", "shared_prefix_256"),
    "disk: int8 instead of fp16": ("features", "int8"),
    "disk: int8, 2 x 2 tokens pooled": ("features", "int8_pool2"),
    "reading a clip's features, checksum included": ("features", "int8_read"),
    "encoding clips in batches of 8 (done on a GPU only)": ("preprocess", "batched_encode"),
}


def summary(results):
    """Format the table of docs/speed.md: factors over the reference, one column per result."""
    columns = {
        f"{r['device']}, {r['shapes']['B']} clips at a time": {
            (row["group"], row["name"]): row for row in r["rows"]
        }
        for r in results
    }
    if not any(r["preset"] == "full" for r in results):
        columns["a CUDA GPU, `--preset full`"] = None

    def cell(rows, group, name, field="factor"):
        if rows is None:
            return "not yet measured"
        if (group, name) not in rows:
            return ""
        row = rows[group, name]
        return "left out" if "left_out" in row else f"{row[field]:.1f}x"

    lines = [
        f"| improvement over the reference | {' | '.join(columns)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for text, where in SUMMARY.items():
        lines.append(f"| {text} | {' | '.join(cell(c, *where) for c in columns.values())} |")
    return "\n".join(lines)
