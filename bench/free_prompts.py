"""Measure how far soft prompts can steer a frozen language model, by training separate ones for each clip.

    python -m bench.free_prompts --lm data/pretrained/smollm2 --annotations data/tabletop/annotations

There is no video and no Q-Former: each clip has its own prompts, which are trained so that the frozen
model writes the clip's label. The share of labels that it then writes word for word estimates an upper
bound for any captioner with as many prompts. Prints it, and writes free_prompts.json to --output. Takes
10 CPU-minutes (est.).
"""

import runtime.start

import time
from pathlib import Path

import torch
from tqdm import tqdm

from captioner import VideoCaptioner, embedding_table, first_token, load_lm
from dataset import VALIDATION, by_hash, collate_text, encode_caption, load_records
from qformer import QFormer
from runtime import cli, devices
from runtime.errors import UserError
from runtime.files import write_json
from runtime.provenance import provenance

BATCH = 16  # clips at a time
LR = 0.05


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("--lm", default="data/pretrained/smollm2", help="folder of the language model")
    add("--annotations", default="data/tabletop/annotations", help="folder with validation.json")
    add("--clips", type=cli.whole(1), default=64, help="number of clips")
    add("--steps", type=cli.whole(1), default=60, help="steps of Adam for each clip")
    add("--num-queries", type=cli.whole(1), default=16, help="soft prompts per clip")
    add("--output", default="results", help="folder for free_prompts.json")
    cli.add_common(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    records = [r for r in load_records(args.annotations, VALIDATION) if r["label"]]
    if not records:
        raise UserError(f"the validation split of {args.annotations} has no labels")
    labels = [r["label"] for r in by_hash_of(records, args.seed)[: args.clips]]
    output = cli.output_folder(args.output, "--output")
    device, dtype = devices.resolve(args.device, args.dtype)
    model = load_model(args.lm, device, dtype)
    torch.manual_seed(args.seed)
    began, written, losses = time.process_time(), [], []
    for start in tqdm(range(0, len(labels), BATCH), unit="batch", leave=False):
        batch = labels[start : start + BATCH]
        texts, loss = steer(model, batch, args.num_queries, args.steps)
        written += texts
        losses += [loss] * len(batch)
    result = {
        "n": len(labels),
        "exact_match": sum(map(str.__eq__, written, labels)) / len(labels),
        "loss": sum(losses) / len(losses),
        "steps": args.steps,
        "num_queries": args.num_queries,
        "cpu_seconds": round(time.process_time() - began, 1),
    }
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "free_prompts.json", provenance() | result)
    print(
        f"free soft prompts: {result['exact_match']:.3f} of {len(labels)} labels word for word, loss"
        f" {result['loss']:.3f}"
    )
    print(f"written to {Path(output) / 'free_prompts.json'}")


def by_hash_of(records, seed):
    """Return the records in a random order that depends on the seed only."""
    by_id = {r["id"]: r for r in records}
    return [by_id[i] for i in by_hash(by_id, seed)]


def load_model(name, device, dtype):
    """Return a `VideoCaptioner` whose Q-Former is not used."""
    lm, tokenizer, _ = load_lm(name, device, dtype)
    width = embedding_table(lm).shape[1]
    sizes = {"num_queries": 1, "width": width, "video_width": 1, "grid": (1, 1, 1)}
    qformer = QFormer(**sizes, num_blocks=1, num_heads=1, dropout=0.0).to(device)
    autocast = lm.dtype != dtype
    return VideoCaptioner(qformer, lm, tokenizer, first_token(tokenizer), autocast_lm=autocast)


def steer(model, labels, queries, steps):
    """Train soft prompts (B, Q, D) for B labels. Returns (their captions, the mean loss of the last step)."""
    table = embedding_table(model.lm).float()  # (V, D)
    norm = table.norm(dim=1).mean().item()
    soft = torch.randn(len(labels), queries, table.shape[1], device=model.device)
    soft = (soft * norm / table.shape[1] ** 0.5).requires_grad_()
    text = collate_text([[encode_caption(model.tokenizer, "label", x)] for x in labels])
    text = {k: v.to(model.device) for k, v in text.items()}
    optimizer = torch.optim.Adam([soft], lr=LR)
    for _ in range(steps):
        loss = model.loss(model.read(soft)[0], text).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return model.generate(model.read(soft)[0], "label"), loss.item()


if __name__ == "__main__":
    cli.run(main)
