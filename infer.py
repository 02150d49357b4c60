"""Caption video files: any container, any length, no dataset needed.

    python infer.py clip.webm other.mp4 folder/ --checkpoint results/ssv2/best.pt
    python infer.py clip.webm --gif --explain    (a film with its caption; where the model looked)
    python infer.py --num-samples 10 --checkpoint results/ssv2/best.pt     (of SSv2's test split)

One line a clip on stdout, `path<TAB>caption`; clips longer than --window seconds are cut into windows,
`path<TAB>start-end<TAB>caption` each. Exit code 3 if some clips failed, 1 if all did. Files of
--output are named after their clip; those of an earlier call are replaced.
"""

import runtime.start

import json
import shutil
from functools import partial
from itertools import count, groupby
from pathlib import Path

import windows
from dataset import STYLES, TEST, by_hash, file_names, load_records
from runtime import cli
from runtime.cli import note
from runtime.errors import DONE, FAILED, PARTIAL, UserError
from runtime.files import write_json
from viz import attention_map, films


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("clips", nargs="*", help="video files, or folders of them (recursive)")
    group = parser.add_argument_group("model")
    windows.add_model_flags(group)
    group = parser.add_argument_group("captions")
    group.add_argument("--style", choices=STYLES, default="label", help="kind of caption")
    windows.add_flags(group)
    group.add_argument("--num-beams", type=cli.whole(1), default=1, help="1 is greedy")
    group.add_argument("--max-new-tokens", type=cli.whole(1), default=50, help="longest caption")
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="a JSON object a line instead of text")
    group.add_argument("--gif", action="store_true", help="a GIF of each clip with its caption")
    group.add_argument("--video", action="store_true", help="the same as MP4 (H.264), full length")
    group.add_argument(
        "--explain", action="store_true", help="a picture of each window: where the queries look"
    )
    group.add_argument(
        "--output",
        help="folder for captions.json and pictures (default: results/captioned with --gif, --video"
        " or --explain, results/samples with --num-samples)",
    )
    group = parser.add_argument_group("clips of a dataset")
    group.add_argument("--num-samples", type=cli.whole(1), help="draw N clips of the test split")
    group.add_argument("--videos", default=cli.VIDEOS, help="clips' folder")
    group.add_argument(
        "--annotations",
        default=cli.ANNOTATIONS,
        help="of prepare_annotations.py; the label of a clip in --videos stands beneath its caption",
    )
    cli.add_common(parser, workers=2)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if bool(args.clips) == bool(args.num_samples):
        raise UserError("name the clips to caption, or draw some with --num-samples N (not both)")
    paths = draw_samples(args) if args.num_samples else windows.find_clips(args.clips)
    paths = paths[: args.limit]
    pictures = args.gif or args.video or args.explain
    default = "results/samples" if args.num_samples else "results/captioned" if pictures else None
    output = args.output or default
    output = output and cli.output_folder(output, "--output")
    names = output_names(paths)
    if pictures:
        films.require()
        refuse_own_inputs(paths, names, output)

    _, encoder, captioner = windows.load_models(args)
    results = []
    labels = references(paths, args) if args.gif or args.video else {}
    look = partial(explain, captioner.qformer, encoder.settings, output, names)
    captions = caption_files(paths, encoder, captioner, args, look if args.explain else None)
    try:
        for path, name, result in zip(paths, names, captions, strict=True):
            results.append(result)
            if path in labels:
                result["reference"] = labels[path]
            write_films(path, result, output / name if output else None, args)
            if problem := result.get("error") or result.get("warning"):
                note(f"{path}: {problem}")
            for line in [json.dumps(result)] if args.json else text_lines(result):
                print(line, flush=True)
    finally:  # also of what there is when it is stopped
        if output:
            save_results(output, results, copy_clips=bool(args.num_samples))
    failed = sum("error" in r for r in results)
    if failed:
        note(f"{failed} of {len(results)} clips failed")
    return FAILED if failed == len(results) else PARTIAL if failed else DONE


def draw_samples(args):
    """Files of N seeded clips of the test split."""
    records = {r["id"]: r for r in load_records(args.annotations, TEST)}
    videos = cli.existing(args.videos, "--videos", "It is the folder of the dataset's clips.")
    paths = []
    for clip_id in by_hash(records, args.seed):
        files = (videos / name for name in file_names(records[clip_id]))
        paths += [path for path in files if path.is_file()][:1]
        if len(paths) == args.num_samples:
            break
    if len(paths) < args.num_samples:
        raise UserError(
            f"--num-samples {args.num_samples}: only {len(paths)} of the {len(records)} test clips"
            f" are in {videos}"
        )
    return paths


def caption_files(paths, encoder, captioner, args, look=None):
    """Caption every window of every file; yields a dict per file, in order.

    {"path", "caption"} or {"path", "windows": [{"start", "end", "caption"}]}, or {"path", "error"};
    "warning" beside a caption of a clip that is cut short. look(windows, features, captions), if
    given, sees each batch of windows before its frames and features are dropped.
    """

    def captioned():
        for batch in windows.read(paths, encoder, args):
            sound = [w for w in batch if not w.error]
            texts = []
            if sound:
                features = windows.features(sound, captioner.device)
                texts = captioner.captions(
                    features, args.style, args.max_new_tokens, args.num_beams
                )
                if look:
                    look(sound, features, texts)
            texts = iter(texts)
            for w in batch:
                w.frames = w.stored = None  # a long film has many windows
                yield w, None if w.error else next(texts)

    for n, group in groupby(captioned(), key=lambda pair: pair[0].file):
        yield describe(paths[n], list(group))


def describe(path, pairs):
    """One file's result from its windows and their captions (None where a window failed)."""
    said = [(w, text) for w, text in pairs if text is not None]
    if not said:
        return {"path": str(path), "error": str(pairs[0][0].error)}
    if len(pairs) == 1:
        result = {"path": str(path), "caption": said[0][1]}
    else:
        spans = [{"start": w.start, "end": w.end, "caption": text} for w, text in said]
        result = {"path": str(path), "windows": spans}
    if len(said) < len(pairs):
        result["warning"] = f"{len(pairs) - len(said)} of {len(pairs)} windows could not be decoded"
    elif any(w.truncated for w, _ in pairs):
        result["warning"] = "the file is cut short; what is there was captioned"
    return result


def output_names(paths):
    """A name for what is written about each file: its own without the ending, with a number where
    another file has it, and short enough for what is put behind it."""
    names, taken = [], {path.stem for path in paths}
    for path in paths:
        stem = windows.stem(path)
        numbered = (f"{stem}-{n}" for n in count(2))
        name = stem if stem not in names else next(n for n in numbered if n not in taken)
        taken.add(name)
        names.append(name)
    return names


def refuse_own_inputs(paths, names, output):
    """Raises UserError where what is written about one clip would replace another."""
    inputs = {path.resolve() for path in paths}
    for name in names if output else []:
        for ending in ("gif", "mp4"):
            if (film := output / f"{name}_captioned.{ending}").resolve() in inputs:
                raise UserError(
                    f"{film} is a clip to caption and would be replaced: use another --output"
                )


def references(paths, args):
    """{path: label} of the files that lie in --videos and have one in --annotations."""
    root, labels = Path(args.videos).resolve(), {}
    inside = {p.resolve().relative_to(root): p for p in paths if root in p.resolve().parents}
    for split in sorted(Path(args.annotations).glob("*.json")) if inside else []:
        for r in load_records(args.annotations, split.stem):
            for name in file_names(r):
                if r["label"] and Path(name) in inside:
                    labels.setdefault(inside[Path(name)], r["label"])
    return labels


def explain(qformer, settings, output, names, batch, features, texts):
    """Write a picture of each window of a batch: where the queries look."""
    maps = attention_map.mass(qformer, features)
    for w, weights, text in zip(batch, maps, texts, strict=True):
        span = "" if w.alone else f"_{w.start:.2f}-{w.end:.2f}"
        picture = attention_map.draw(w.frames, weights, settings, text)
        films.save(output / f"{names[w.file]}_attention{span}.png", picture)


def write_films(path, result, stem, args):
    """Write the films of one file that were asked for; one that fails is the result's warning.

    stem: their path, up to what tells them apart.
    """
    from runtime.errors import VideoError

    if "error" in result:
        return
    for wanted, draw, ending in ((args.gif, films.gif, "gif"), (args.video, films.mp4, "mp4")):
        if wanted:
            try:
                films.save(stem.with_name(f"{stem.name}_captioned.{ending}"), draw(path, result))
            except VideoError as error:
                result["warning"] = f"no {ending}: {error}"


def text_lines(result):
    """The stdout lines of one file; none for one that failed."""
    path = cli.printable(result["path"], keep="")  # a line stays a line
    if "windows" in result:
        for w in result["windows"]:
            yield f"{path}\t{w['start']:.1f}-{w['end']:.1f}\t{w['caption']}"
    elif "caption" in result:
        yield f"{path}\t{result['caption']}"


def save_results(output, results, copy_clips):
    """Write captions.json, and the clips beside it."""
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "captions.json", results)
    for path in [Path(r["path"]) for r in results if copy_clips and "error" not in r]:
        copy = output / path.name
        if not (copy.exists() and copy.samefile(path)):
            shutil.copyfile(path, copy)
    note(f"written to {output}")


if __name__ == "__main__":
    cli.run(main)
