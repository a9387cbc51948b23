-- How many synthetic instructions repeat another one, exactly, or but for case and white space?
-- A rate far above that of real data means that the temperature is too low or the model collapsed.
WITH counted AS (
  SELECT
    count(*) AS instructions,
    count(DISTINCT text) AS distinct_texts,
    count(DISTINCT trim(regexp_replace(lower(text), '\s+', ' ', 'g'))) AS distinct_normalised
  FROM synthetic
)
SELECT
  instructions,
  instructions - distinct_texts AS exact_duplicates,
  round(1 - CAST(distinct_texts AS DOUBLE) / instructions, 4) AS exact_rate,
  instructions - distinct_normalised AS normalised_duplicates,
  round(1 - CAST(distinct_normalised AS DOUBLE) / instructions, 4) AS normalised_rate
FROM counted;
