-- What did resampling do to the clusters? Each cluster's share of the synthetic set, of the private votes (noised, with
-- negatives as 0), and of the selection, the largest share of votes first.
-- The selection follows the votes, but a cluster gives no more rows than it has. `all_taken` marks those that gave all;
-- what they had may have been just enough.
WITH shares AS (
  SELECT
    bin,
    synthetic_count,
    selected_count,
    CAST(synthetic_count AS DOUBLE) / sum(synthetic_count) OVER () AS synthetic_share,
    CAST(greatest(noisy_count, 0) AS DOUBLE) / nullif(sum(greatest(noisy_count, 0)) OVER (), 0) AS vote_share,
    CAST(selected_count AS DOUBLE) / nullif(sum(selected_count) OVER (), 0) AS selected_share
  FROM histogram
)
SELECT
  bin,
  synthetic_count AS before,
  selected_count AS after,
  round(synthetic_share, 4) AS share_before,
  round(vote_share, 4) AS share_of_votes,
  round(selected_share, 4) AS share_after,
  synthetic_count > 0 AND selected_count = synthetic_count AS all_taken
FROM shares
ORDER BY vote_share DESC, bin;
