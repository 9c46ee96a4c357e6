"""Train a T5 tokenizer on captions, beside a random T5 encoder to train with it:
`python -m training.train_tokenizer --train_manifest M --output_dir OUT`.

`training.train --text_encoder OUT --train_text_encoder` starts from it. A pretrained FLAN-T5 has a far larger
vocabulary; this is for a Tango that has to be small.
"""

import json
import logging
import sys
import tempfile
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from pipeline_tango.flags import COUNT, INDEX, Number, check_numbers

from .arguments import build_parser
from .data import read_manifest
from .run import replacing, run


logger = get_logger(__name__)

# narrow and shallow: 1.5 million parameters beside the embeddings
TEXT_ENCODER_CONFIG = {
    "d_model": 192,
    "d_kv": 32,
    "d_ff": 512,
    "num_layers": 4,
    "num_heads": 6,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.1,
}


def parse_args(argv=None):
    description = (
        "Train a T5 tokenizer on the captions of a manifest, and save a random T5 encoder for its tokens with it. The "
        "folder is what --text_encoder of training.train takes, with --train_text_encoder."
    )
    parser = build_parser(__spec__.name, description, launch=False)
    parser.add_argument(
        "--train_manifest", nargs="+", required=True, help="manifests with captions, as training.train reads them"
    )
    parser.add_argument("--caption_column", help="column of the caption or list of captions (default: by convention)")
    parser.add_argument("--output_dir", required=True, help="folder to write, which must not exist yet")
    parser.add_argument("--vocab_size", type=COUNT, default=1000, help="tokens, at most")
    parser.add_argument(
        "--max_length", type=Number(int, 2), default=64, help="tokens of a prompt; longer ones are cut"
    )
    parser.add_argument("--config", help="JSON file with arguments of T5Config that differ from the default's")
    parser.add_argument("--seed", type=INDEX, default=0, help="of the random weights")
    args = parser.parse_args(argv)
    if args.vocab_size < 100:
        parser.error(f"--vocab_size has to be at least 100, since every character is a token, not {args.vocab_size}")
    check_numbers(parser, args)
    if Path(args.output_dir).exists():
        parser.error(f"--output_dir {args.output_dir} exists already")
    return args


def train_tokenizer(captions, vocab_size, max_length):
    """A `T5Tokenizer` that reads upper case as lower case, of at most `vocab_size` pieces, with every character of
    `captions` and every printable ASCII character among them.

    Source of the algorithm: Kudo 2018, arXiv 1804.10959 (unigram language model).
    """
    try:
        import sentencepiece
    except ImportError as error:
        raise ValueError('training a tokenizer needs sentencepiece: pip install "pipeline-tango[train]"') from error
    with tempfile.TemporaryDirectory() as folder:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sorted(captions)),
            model_prefix=f"{folder}/spiece",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=1.0,
            required_chars="".join(map(chr, range(33, 127))).lower(),
            normalization_rule_name="nmt_nfkc_cf",  # case folding
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=1,
        )
        return T5Tokenizer.from_pretrained(
            folder, extra_ids=0, additional_special_tokens=[], model_max_length=max_length
        )


def train(args):
    PartialState()  # accelerate's logger needs it
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    columns = {"caption_column": args.caption_column} if args.caption_column else {}
    captions = [
        caption
        for manifest in args.train_manifest
        for clip in read_manifest(manifest, **columns)
        for caption in clip.captions
        if caption.strip()
    ]
    if not captions:
        raise ValueError(f"`--train_manifest`: no caption in {', '.join(args.train_manifest)}")
    tokenizer = train_tokenizer(captions, args.vocab_size, args.max_length)
    config = TEXT_ENCODER_CONFIG | (json.loads(Path(args.config).read_text()) if args.config else {})
    torch.manual_seed(args.seed)
    text_encoder = T5EncoderModel(T5Config(vocab_size=len(tokenizer), **config))
    with replacing(Path(args.output_dir)) as folder:
        tokenizer.save_pretrained(folder)
        text_encoder.save_pretrained(folder)
    num_tokens = sum(len(ids) for ids in tokenizer(captions).input_ids) / len(captions)
    logger.info(
        f"{len(tokenizer)} tokens from {len(set(captions))} captions, {num_tokens:.1f} a caption; an encoder of "
        f"{text_encoder.num_parameters():,} random parameters: {args.output_dir}"
    )
    return 0


def main(argv=None):
    return run(train, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
