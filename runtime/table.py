"""Read a table that a user wrote: CSV with a header, a JSON list of objects, or JSON objects."""

import csv
import io
import json
import re
from collections import Counter
from contextlib import suppress

from runtime.errors import UserError, refuse
from runtime.files import read_text

DELIMITERS = ",;\t"
JSON_SPACE = re.compile(r"[ \t\r\n]*")


def read_table(path, what, required, optional=()):
    """Read the rows of a file. Returns [(where, row)].

    where: "line 3" or, in a JSON list, "entry 3". row: a dict by column. Capitals and spaces around the
    names of columns do not matter. required, optional: names of columns in lower case. Raises UserError,
    with `what` and the place, if the file cannot be read or can be read in more than one way.
    """
    text = read_text(path, what)
    if (joint := text.find("\n\ufeff")) >= 0:
        line = text.count("\n", 0, joint) + 2
        raise UserError(
            f"{what} {path} has a byte order mark on line {line}, as if two files had been joined; pass one"
            " file with one header"
        )
    is_json = path.suffix.lower() in (".json", ".jsonl", ".ndjson")
    read = _read_json if is_json or text.lstrip()[:1] in ("[", "{") else _read_csv
    rows = read(f"{what} {path}", text, required, optional)
    if not rows:
        raise UserError(f"{what} {path} contains no rows")
    return rows


def _read_json(file, text, required, optional):
    try:
        values = list(_json_values(text))
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}: {error.msg}, at character {error.colno}"
        raise UserError(f"{file} is not valid JSON, {where}") from None
    except (ValueError, RecursionError) as error:  # ValueError: a number of over 4300 digits
        raise UserError(f"{file} cannot be read as JSON: {error}") from None
    if len(values) == 1 and isinstance(values[0][1], list):
        rows = [(f"entry {n}", row) for n, row in enumerate(values[0][1], 1)]
    else:
        rows = values
    refuse([w for w, row in rows if not isinstance(row, dict)], f"rows of {file} are not objects")
    names = (*required, *optional)
    if len(values) == 1 and rows is values and not set(required) & set(map(_column, rows[0][1])):
        raise UserError(
            f"{file} must be a list of objects, or one object per row, with the keys"
            f" {', '.join(required)}"
        )
    twice = [where for where, row in rows if _repeated(map(_column, row), names)]
    refuse(twice, f"rows of {file} have a key twice, apart from capitals and spaces")
    return [(where, {_column(k): value for k, value in row.items()}) for where, row in rows]


def _json_values(text):
    """Yield ("line N", value) of JSON values, one after the other. Each may take several lines."""
    decoder, line, end = json.JSONDecoder(), 1, 0
    while (start := JSON_SPACE.match(text, end).end()) < len(text):
        line += text.count("\n", end, start)
        value, end = decoder.raw_decode(text, start)
        yield f"line {line}", value
        line += text.count("\n", start, end)


def _read_csv(file, text, required, optional):
    delimiter = _delimiter(text, required)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    # start: the line on which a row starts; a quoted cell may have several lines
    rows, start = [], 1
    try:
        for cells in reader:
            if any(map(str.strip, cells)):
                rows.append((f"line {start}", cells))
            start = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{file} is not valid CSV, in the row on line {start}: {error}") from None
    header = [_column(cell) for cell in rows[0][1]] if rows else []
    if not set(required) <= set(header):
        columns = ",".join(required) + "".join(f"[,{name}]" for name in optional)
        raise UserError(
            f"{file} needs a header with {columns}, separated by commas, semicolons or tabs; its first"
            f" line is {','.join(header or ['empty'])[:100]!r}"
        )
    if twice := _repeated(header, (*required, *optional)):
        raise UserError(f"{file} has two columns named {twice!r}; remove one of them")
    long = [where for where, cells in rows if any(map(str.strip, cells[len(header) :]))]
    hint = f"text that contains {delimiter!r} needs quotes"
    refuse(long, f"rows of {file} have more cells than the header ({hint})")
    return [(where, dict(zip(header, cells, strict=False))) for where, cells in rows[1:]]


def _delimiter(text, required):
    """Return the delimiter with which the first line that is not blank has all required columns."""
    header = next((line for line in text.split("\n") if line.strip()), "")
    for delimiter in DELIMITERS:
        with suppress(csv.Error):  # a cell of over 131,072 characters
            cells = next(csv.reader([header], delimiter=delimiter), [])
            if set(required) <= set(map(_column, cells)):
                return delimiter
    return DELIMITERS[0]


def _column(name):
    return " ".join(name.split()).lower()


def _repeated(found, names):
    """Return the first of `names` that occurs more than once in `found`, or None."""
    counts = Counter(found)
    return next((name for name in names if counts[name] > 1), None)
