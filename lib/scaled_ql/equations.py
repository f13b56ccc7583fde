"""Equations in rendered notebooks: LaTeX becomes MathML, which browsers show offline."""

from jinja2 import pass_context
from jinja2.runtime import Context
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath


class ReportExporter(HTMLExporter):
    """nbconvert's HTML exporter, with equations that need neither a network nor MathJax."""

    @pass_context
    def markdown2html(self, context: Context, source: str) -> str:
        """Render a text cell; the parent's method leaves LaTeX to MathJax."""
        cell, resources = context.get("cell", {}), context.get("resources", {})
        renderer = _Renderer(
            escape=False,
            attachments=cell.get("attachments", {}),
            embed_images=self.embed_images,
            path=resources.get("metadata", {}).get("path", ""),
            anchor_link_text=self.anchor_link_text,
            exclude_anchor_links=self.exclude_anchor_links,
        )
        return MarkdownWithMath(renderer=renderer).render(source)


class _Renderer(IPythonRenderer):
    def block_math(self, body: str) -> str:
        return _to_mathml(body, "block") or super().block_math(body)

    def inline_math(self, body: str) -> str:
        return _to_mathml(body, "inline") or super().inline_math(body)


def _to_mathml(latex: str, display: str) -> str:
    """MathML, or an empty string for unsupported LaTeX, which is then shown as written."""
    try:
        return convert(latex.strip(), display=display)
    except Exception:  # latex2mathml's errors have no common base
        return ""
