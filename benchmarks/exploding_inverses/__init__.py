"""Understanding and mitigating exploding inverses (Behrmann et al., 2021): its experiments."""
