"""transformers' own command line, with Fwd2Bot's model classes registered in its process.

    python -m llava_fwd2bot.integrations.transformers_cli serve my-fwd2bot

is `transformers serve my-fwd2bot`, which has no place for plugins: it answers OpenAI's chat requests with images. It
compresses the image of every request anew; a server that keeps summaries is `fwd2bot serve`.
"""

from __future__ import annotations

from ..checkpoint.load import register


def main() -> None:
    """Raises ImportError where this transformers has no such command line, or a package of it is missing."""
    register()
    try:
        from transformers.cli.transformers import main as theirs
    except ModuleNotFoundError as error:
        raise ImportError(f"This transformers has no command line to register in ({error}): upgrade it.") from error
    theirs()


if __name__ == "__main__":
    main()
