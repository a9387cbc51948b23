-- Which selected instructions say nearly the same? Pairs of one cluster whose embeddings have a cosine similarity of at
-- least 0.95, the closest first, at most 50. Comparing within clusters divides the work, which grows with the square of
-- the set, by about the number of clusters.
WITH vectors AS (
  SELECT selected.bin, selected.id, selected.text, embeddings.embedding
  FROM selected
  JOIN embeddings ON embeddings.id = selected.id
),
pairs AS (
  SELECT
    a.bin,
    cosine_similarity(a.embedding, b.embedding) AS cosine,
    a.id AS a_id,
    b.id AS b_id,
    a.text AS a_text,
    b.text AS b_text
  FROM vectors AS a
  JOIN vectors AS b ON a.bin = b.bin AND a.id < b.id
)
SELECT
  bin,
  round(cosine, 4) AS similarity,
  regexp_replace(left(a_text, 60), '\s+', ' ', 'g') AS one,
  regexp_replace(left(b_text, 60), '\s+', ' ', 'g') AS other
FROM pairs
WHERE cosine >= 0.95
ORDER BY cosine DESC, a_id, b_id
LIMIT 50;
