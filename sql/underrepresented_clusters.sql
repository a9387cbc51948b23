-- Which kinds of instruction do the private votes want more of than sampling gave?
-- The ten clusters with the largest lack, each with the three texts nearest to its centre, cut at 100 characters.
-- For runs that voted on their own `synthetic`; with another table (vote --candidates) there are no examples.
WITH shares AS (
  SELECT
    bin,
    synthetic_count,
    CAST(greatest(noisy_count, 0) AS DOUBLE) / nullif(sum(greatest(noisy_count, 0)) OVER (), 0) AS vote_share,
    CAST(synthetic_count AS DOUBLE) / sum(synthetic_count) OVER () AS synthetic_share
  FROM histogram
),
lacking AS (
  SELECT bin, synthetic_count, vote_share, synthetic_share, vote_share - synthetic_share AS lack
  FROM shares
  WHERE vote_share > synthetic_share
  ORDER BY lack DESC, bin
  LIMIT 10
),
examples AS (
  SELECT
    clusters.bin,
    synthetic.text,
    row_number() OVER (PARTITION BY clusters.bin ORDER BY clusters.distance, clusters.id) AS nearest
  FROM clusters
  JOIN synthetic ON synthetic.id = clusters.id
  WHERE clusters.bin IN (SELECT bin FROM lacking)
)
SELECT
  lacking.bin,
  synthetic_count AS instructions,
  round(vote_share, 4) AS share_of_votes,
  round(synthetic_share, 4) AS share_of_synthetic,
  round(lack, 4) AS lack,
  nearest,
  regexp_replace(left(text, 100), '\s+', ' ', 'g') AS example
FROM lacking
LEFT JOIN examples ON examples.bin = lacking.bin AND nearest <= 3
ORDER BY lack DESC, lacking.bin, nearest;
