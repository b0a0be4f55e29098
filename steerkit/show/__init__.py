"""Show: plots, HTML reports, the local page with sliders, terminal tables."""
