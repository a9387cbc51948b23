-- Which kinds of instruction did sampling give more of than the private votes want?
-- The ten clusters with the largest excess, each with the three texts nearest to its centre, cut at 100 characters.
-- For runs that voted on their own `synthetic`; with another table (vote --candidates) there are no examples.
WITH shares AS (
  SELECT
    bin,
    synthetic_count,
    coalesce(CAST(greatest(noisy_count, 0) AS DOUBLE) / nullif(sum(greatest(noisy_count, 0)) OVER (), 0), 0)
      AS vote_share,
    CAST(synthetic_count AS DOUBLE) / sum(synthetic_count) OVER () AS synthetic_share
  FROM histogram
),
excessive AS (
  SELECT bin, synthetic_count, vote_share, synthetic_share, synthetic_share - vote_share AS excess
  FROM shares
  WHERE synthetic_share > vote_share
  ORDER BY excess DESC, bin
  LIMIT 10
),
examples AS (
  SELECT
    clusters.bin,
    synthetic.text,
    row_number() OVER (PARTITION BY clusters.bin ORDER BY clusters.distance, clusters.id) AS nearest
  FROM clusters
  JOIN synthetic ON synthetic.id = clusters.id
  WHERE clusters.bin IN (SELECT bin FROM excessive)
)
SELECT
  excessive.bin,
  synthetic_count AS instructions,
  round(vote_share, 4) AS share_of_votes,
  round(synthetic_share, 4) AS share_of_synthetic,
  round(excess, 4) AS excess,
  nearest,
  regexp_replace(left(text, 100), '\s+', ' ', 'g') AS example
FROM excessive
LEFT JOIN examples ON examples.bin = excessive.bin AND nearest <= 3
ORDER BY excess DESC, excessive.bin, nearest;
