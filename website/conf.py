"""Sphinx's settings for the course's website. `build` passes this folder as the one that holds them."""

from pathlib import Path

HERE = Path(__file__).resolve().parent

project = "The QLoRA course"
extensions = ["myst_parser", "sphinx_copybutton", "sphinx.ext.githubpages", "website.folding"]
myst_enable_extensions = ["dollarmath"]  # Jupyter and GitHub read formulas between dollars, too
myst_heading_anchors = 6  # named as on GitHub, so a link to a heading works here and there
myst_url_schemes = ["http", "https", "mailto", "copy"]
# MyST knows the anchors of headings and not those of raw HTML, such as the claims'. `links` checks all of them afterwards.
suppress_warnings = ["myst.xref_missing"]
highlight_language = "text"  # commands and printed text; code says what it is in
pygments_style, pygments_dark_style = "a11y-light", "github-dark"
html_math_renderer = "mathml"

html_theme = "furo"
html_title = project
html_static_path = [str(HERE / "static")]
html_favicon = str(HERE / "static" / "favicon.svg")
html_css_files = ["course.css"]
html_copy_source = html_show_sourcelink = html_show_sphinx = html_show_copyright = False
html_use_index = False
html_permalinks_icon = "#"
copybutton_exclude = ".linenos, .gp"
copybutton_selector = ".content div.highlight:not(.cell-output *) pre, div.cell-code pre"
