"""Write a tiny data set in Something-Something-V2's layout, and the two tiny models to run on it.

    python -m worlds.toy_ssv2 data/toy

With `--encoder data/toy/encoder` and `--lm data/toy/lm` the real scripts run on it unchanged, without
SSv2, pretrained weights or a GPU. Coloured shapes move over a grey background. The action can only be
recognised from their motion, so one frame is not enough. Scores do not carry over to SSv2. The defaults
take about 100 s on two idle cores (est.) and 47 MB:

    videos/       <id>.webm, VP9, 12 frames/s, 64x64, 18-28 frames
    labels/       train, validation, test, labels (.json) and test-answers.csv as SSv2 has them, and
                  validation_pairs    two objects that never occur together in training
                  validation_objects  combinations of colour and shape that training never shows
    paraphrases/  ten shards of whole sentences for training, one file for validation
    encoder/      a V-JEPA 2 with random weights
    lm/           a Qwen2 trained on text alone to turn keywords into captions. Without this training,
                  no prefix could control the frozen model.

The same flags always give the same files. A second run keeps finished files.
"""

import runtime.start

import multiprocessing
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tqdm import tqdm

from runtime import cli
from runtime.cli import add_workers, parser, whole
from runtime.errors import FAILED, UserError
from runtime.files import write_json
from runtime.names import counted
from worlds.shapes import ACTIONS, SHAPES, paraphrases_of, plan
from worlds.shapes_video import render
from worlds.ssv2_files import (
    ignore_interrupt,
    make_folder,
    mark_finished,
    mark_started,
    start_clips,
    write_labels,
    write_paraphrases,
)
from worlds.toy_models import write_encoder, write_lm

WORLD = 1  # increment when a change to the code changes the files
OLD_PREFIX = "something-something-v2-"  # of the label files


def parse_args(argv=None):
    p = parser(__doc__)
    p.add_argument("output", help="folder for the toy world")
    group = p.add_argument_group("world")
    group.add_argument("--clips", type=whole(50), default=4000, help="number of training clips")
    group.add_argument("--seed", type=cli.seed, default=0, help="seed of all random choices")
    group.add_argument(
        "--old-names",
        action="store_true",
        help="name the label files something-something-v2-train.json and so on",
    )
    group = p.add_argument_group("language model")
    group.add_argument(
        "--lm-steps",
        type=whole(1),
        default=800,
        help="training steps of the language model (32 captions each)",
    )
    group = p.add_argument_group("machine")
    add_workers(group, 2, least=1)
    return p.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    root = Path(args.output)
    settings = {"world": WORLD, "clips": args.clips, "seed": args.seed}
    settings |= {"old_names": args.old_names, "lm_steps": args.lm_steps}
    mark_started(root, settings)
    clips = plan(args.clips, args.seed)
    write_json(root / "world.json", {"name": "shapes", "synthetic": True, "nouns": sorted(SHAPES)})
    templates = {action.keyword: action.template for action in ACTIONS}
    prefix = OLD_PREFIX if args.old_names else ""
    make_folder(root, "labels", lambda folder: write_labels(folder, clips, templates, prefix))
    make_folder(
        root,
        "paraphrases",
        lambda folder: write_paraphrases(folder, clips, lambda c: paraphrases_of(c, args.seed)),
    )
    pool = ProcessPoolExecutor(
        args.workers, multiprocessing.get_context("spawn"), initializer=ignore_interrupt
    )
    with tqdm(total=len(clips), desc="clips", unit=" clips") as bar:
        try:
            futures = start_clips(pool, root / "videos", clips, render, args.seed, bar)
            make_folder(root, "encoder", lambda folder: write_encoder(folder, args.seed))
            report = make_folder(
                root,
                "lm",
                lambda folder: write_lm(folder, args.seed, args.lm_steps, bar.set_postfix_str),
            )
            for future in futures:
                future.result()
        except OSError as error:  # most likely a full disk
            raise UserError(f"cannot write to {root}: {error}", code=FAILED) from None
        finally:
            pool.shutdown(cancel_futures=True)
    if report:
        print(report)
    mark_finished(root, settings)
    counts = Counter(c["split"] for c in clips)
    parts = [f"{counted(n, 'clip')} {split}" for split, n in counts.items()]
    print(f"{root}: {', '.join(parts)}")


if __name__ == "__main__":
    cli.run(main)
