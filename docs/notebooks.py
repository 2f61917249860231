"""A notebook as a page of the site, with the outputs that were kept in it: nothing is run."""

import json

from myst_parser.sphinx_ import Parser

LANGUAGE = "python"


class NotebookParser(Parser):
    """Reads a notebook as the Markdown that it is, with its code and outputs between."""

    supported = ("notebook",)

    def parse(self, inputstring, document):
        cells = json.loads(inputstring)["cells"]
        super().parse("\n\n".join(block for cell in cells for block in blocks(cell)), document)


def blocks(cell):
    """Markdown of a cell."""
    text = "".join(cell["source"])
    if cell["cell_type"] != "code":
        yield text
        return
    yield f"```{LANGUAGE}\n{text}\n```"
    for output in cell["outputs"]:
        yield shown(output)


def shown(output):
    """The richest form of an output that a page can show."""
    data = output.get("data", {})
    if "image/png" in data:
        picture = "".join(data["image/png"]).replace("\n", "")
        return raw(f'<img alt="Output: a picture" src="data:image/png;base64,{picture}">')
    if "text/html" in data:
        return raw("".join(data["text/html"]))
    return "```text\n" + "".join(data.get("text/plain", output.get("text", ""))).rstrip() + "\n```"


def raw(html):
    """HTML as it stands; fences of its own, since it has empty lines."""
    return f'````{{raw}} html\n<div class="notebook-output">{html}</div>\n````'


def setup(app):
    app.add_source_parser(NotebookParser)
    return {"parallel_read_safe": True}
