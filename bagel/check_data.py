"""Check record files before training: every malformed record with its line, and counts of what is learned.

    python bagel/check_data.py --data-path train.jsonl [--config small] [--image-root DIR] [--decode] [--output FILE]

Exit code 0 when every record is valid, 1 when some are not, 2 when the file cannot be read at all.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from bagel.config import PRESETS, Config
from shared.config import Section, load_config, setting
from shared.errors import BadSample, command


class Options(Section):
    """Command line."""

    data_path: str = setting("", "record files, separated by commas", "train_data_path")
    preset: str = setting("7b", "preset or YAML file whose picture sizes and length limit count", "config")
    image_root: str | None = setting(None, "folder that relative picture paths start from")
    tokenizer: str = setting("bytes", "bytes, or a folder with the tokenizer of the training, for exact lengths")
    decode: bool = setting(False, "also decode every picture, which finds damaged ones")
    escape_special_tokens: bool = setting(
        False, "read the four marks as plain text where they occur in a record's text"
    )
    output: str | None = setting(None, "JSON lines file for all faults")


@command
def main(argv: list[str] | None = None) -> int:
    """Read the records and report."""
    options = load_config(Options, argv=argv, description=__doc__)
    from bagel.data.tokenizer import load_tokenizer
    from bagel.dataset import DataError, open_dataset
    from shared.errors import UserError

    if not options.data_path:
        raise UserError("give --data-path FILE")
    config = load_config(Config, presets=PRESETS, argv=["--config", options.preset], default="7b")
    config.data.image_root, config.data.escape_special_tokens = options.image_root, options.escape_special_tokens
    config.model.tokenizer, config.model.from_scratch = options.tokenizer, True
    dataset = open_dataset(config, config.model, load_tokenizer(config.model), options.data_path)
    if options.decode:
        for index in range(len(dataset)):
            try:
                dataset.sample(index, 0)
            except BadSample as fault:
                record = dataset.records[index]
                dataset.errors.append(
                    DataError(
                        str(record.source.path), record.line, record.value.get("id"), "E_IMAGE_DECODE", str(fault)
                    )
                )
    found = dataset.describe()
    print(f"{found['records']} valid records {found['formats']}, targets {found['targets']}, tokens {found['length']}")
    for error in dataset.errors:
        print(error)
    print(f"{len(dataset.errors)} faults")
    if options.output:
        dataset.write_errors(Path(options.output))
    return 1 if dataset.errors else 0


if __name__ == "__main__":
    raise SystemExit(main())
