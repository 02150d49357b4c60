"""Write a data set in Something-Something-V2's layout: rendered household objects on a table.

    python -m pip install -e '.[tabletop]'
    python -m worlds.tabletop data/tabletop --clips 2000 --seed 0

A hand moves one or two of 27 objects, following 22 of SSv2's templates. Several templates differ only in
the order of events, and the first frame reveals little about the template. The clips are synthetic: scores
do not carry over to SSv2. The pictures of tables and walls come from a package (robosuite 1.5.2, MIT,
157 MB), which is downloaded but not installed. The defaults take about 5 minutes on two idle cores (est.)
and 90 MB:

    videos/       <id>.webm, VP9, 12 frames/s, 160x120, 16-24 frames
    labels/       train, validation, test, labels (.json) and test-answers.csv as in SSv2, and
                  validation_pairs       pairs of objects, or of an object and a template, that training
                                         never shows
                  validation_objects     objects that training never shows, such as a carrot
                  validation_background  tables and walls that training never shows
    paraphrases/  ten shards of whole sentences for training, one file for validation
    surfaces/     the pictures of tables and walls
    world.json    the world's name and its nouns; "synthetic": true

A clip depends only on the seed, its split and its number: with more clips, the earlier ones stay the same.
A second run keeps finished clips. The same seed always gives the same files on one machine.
"""

import runtime.start

import functools
import multiprocessing
import resource
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tqdm import tqdm

from runtime import cli
from runtime.cli import add_workers, note, parser, whole
from runtime.errors import FAILED, UserError
from runtime.files import write_json
from runtime.names import counted
from worlds.ssv2_files import (
    ignore_interrupt,
    mark_finished,
    mark_started,
    start_clips,
    write_labels,
    write_paraphrases,
)
from worlds.tabletop_plan import NOUNS, TEMPLATES, TRAINING, paraphrases_of, plan, sizes
from worlds.tabletop_scene import load_mujoco, render
from worlds.tabletop_textures import fetch_pictures

WORLD = 1  # increment when a change to the code changes the files


def parse_args(argv=None):
    p = parser(__doc__)
    p.add_argument("output", help="folder for the tabletop world")
    group = p.add_argument_group("world")
    group.add_argument("--clips", type=whole(50), default=2000, help="number of training clips")
    group.add_argument("--seed", type=cli.seed, default=0, help="seed of all random choices")
    group = p.add_argument_group("machine")
    add_workers(group, 2, least=1)
    return p.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    root, settings = Path(args.output), {"world": WORLD, "seed": args.seed}
    load_mujoco()
    mark_started(root, settings, "tabletop")
    fetch_pictures(root / "surfaces")
    clips = plan(sizes(args.clips), args.seed)
    write_texts(root, clips, args.seed)
    write_videos(root, clips, args.seed, args.workers)
    mark_finished(root, settings | {"clips": args.clips}, "tabletop")
    counts = Counter(c["split"] for c in clips)
    parts = [f"{counted(n, 'clip')} {split}" for split, n in counts.items()]
    print(f"{root}: {', '.join(parts)}")


def write_texts(root, clips, seed):
    """Write labels, paraphrases and world.json."""
    for name in ("labels", "paraphrases"):
        (root / name).mkdir(exist_ok=True)
    write_labels(root / "labels", clips, TEMPLATES)
    write_paraphrases(root / "paraphrases", clips, lambda clip: paraphrases_of(clip, seed))
    nouns = {"nouns": sorted(TRAINING), "unseen_nouns": sorted(set(NOUNS) - set(TRAINING))}
    write_json(root / "world.json", {"name": "tabletop", "synthetic": True, **nouns})


def write_videos(root, clips, seed, workers):
    """Render the clips that are missing, and print the speed."""
    draw = functools.partial(render, str(root / "surfaces"))
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=ignore_interrupt
    )
    with tqdm(total=len(clips), desc="clips", unit=" clips") as bar:
        try:
            futures = start_clips(pool, root / "videos", clips, draw, seed, bar)
            for future in futures:
                future.result()
        except OSError as error:  # most likely a full disk
            raise UserError(f"cannot write to {root}: {error}", code=FAILED) from None
        finally:
            pool.shutdown(cancel_futures=True)
    rendered = bar.n - bar.initial
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    if rendered:
        seconds = used.ru_utime + used.ru_stime
        note(f"{counted(rendered, 'clip')}, {rendered / seconds:.1f} per CPU-second")


if __name__ == "__main__":
    cli.run(main)
