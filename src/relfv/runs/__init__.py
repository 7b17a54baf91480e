"""The work behind each command: one q_id, all q_ids, one stage alone, cross, verify, manifest."""
