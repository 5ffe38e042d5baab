"""What was found, and how it is shown.

``verdict``, ``uses`` and ``limits`` are the terms; ``result`` is what one check found, and
``audit_report`` what all of them did. ``from_json`` reads a report, ``exchange`` writes it for
other tools, ``comparison`` puts several next to each other. The other modules need the extra
``report``: ``html`` renders the templates of this folder, ``sections`` chooses the figures,
``plots`` draws them, ``history_page`` shows a training run, ``data_frame`` makes tables.
"""
