"""The site as a pure function of entries, vocabularies and ledger: pages, JSON, BibTeX, feed and charts as files.

Nothing here knows the site builder: `site.render` fills a folder with Markdown and static files, `builder.build`
hands that folder to MkDocs. Same input, same bytes; no clock and no network.
"""
