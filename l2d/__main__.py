"""`python -m l2d COMMAND DIR ...`: trace shows how tokens form; chat, serve and card talk to, serve and describe it.

`dequantize` writes a base, of whatever kind, as a plain model.
"""

from l2d.cli.parser import Parser


def main(arguments: list[str] | None = None) -> None:
    """The command line; users' mistakes end it with one line."""
    from l2d.cli import card, chat, dequantize, serve, trace_command

    parser = Parser(prog="python -m l2d", description="An L2D checkpoint at hand")
    commands = parser.add_subparsers(required=True, metavar="trace | chat | serve | card | dequantize")
    for name, module, words in (
        ("trace", trace_command, "show how each token of an answer forms"),
        ("chat", chat, "talk to the model; budget and guidance may change on the way"),
        ("serve", serve, "serve the model to OpenAI clients"),
        ("card", card, "write the model card from measured results, and upload the checkpoint"),
        ("dequantize", dequantize, "write a GGUF file, a quantized model or an adapter on its base as a plain model"),
    ):
        command = commands.add_parser(name, help=words, description=words)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (OSError, ValueError) as error:
        parser.exit(1, f"l2d: {' '.join(str(error).split())}\n")


if __name__ == "__main__":
    main()
